"""What clients send and get, in the words of OpenAI's interface; plain data, without torch."""

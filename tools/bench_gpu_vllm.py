"""vLLM in a process of its own, which decodes whenever it is told to: bench_gpu_vllm.py FOLDER NEW_TOKENS

Prompts come as one line of JSON; after that each line is answered by the seconds that decoding them took. vLLM is no
dependency of this project: where it is not installed the GPU bench says so and goes on.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

MEMORY_SHARE = 0.3
"""Of the GPU's memory: the model that is compared with is there too."""


def is_vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VllmChild:
    """
    Args:
        folder: a Hugging Face folder without a tokenizer.
        prompts: token ids.
    """

    def __init__(self, folder: Path, prompts: list[list[int]], new_tokens: int) -> None:
        self.version = importlib.metadata.version("vllm")
        command = [sys.executable, __file__, str(folder), str(new_tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(json.dumps(prompts))

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    def seconds(self) -> float:
        """Decode all prompts once more."""
        return float(self._ask("again"))

    def __enter__(self) -> "VllmChild":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Its input ends, and with that the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        for answer in self._process.stdout:  # vLLM may print lines of its own
            if answer.startswith(_MARK):
                return answer.removeprefix(_MARK)
        raise RuntimeError(f"vLLM ended with status {self._process.wait()}")


_MARK = "answer: "


def main() -> int:
    folder, new_tokens = sys.argv[1], int(sys.argv[2])
    prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(sys.stdin.readline())]
    from vllm import LLM, SamplingParams

    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + new_tokens
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        gpu_memory_utilization=MEMORY_SHARE,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    print(f"{_MARK}ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        print(f"{_MARK}{time.perf_counter() - started}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

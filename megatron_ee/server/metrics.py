"""What /metrics says, by the names that people know from other servers of language models."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "megatron_ee"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one server; nothing of the process's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "from a request to its first token")
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "between two tokens of a text")
        self.latency = self._histogram("e2e_request_latency_seconds", "from a request to its end")
        self.num_running = self._gauge("num_requests_running", "texts that the engine has")
        self.num_waiting = self._gauge("num_requests_waiting", "texts that wait for their turn")
        self.prompt_tokens = self._counter("prompt_tokens", "of requests that were taken in")
        self.generation_tokens = self._counter("generation_tokens", "new tokens")
        self.exit_tokens = self._counter("exit_tokens", "new tokens by the layers run for them", "exit_layer")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "tokens that an exit drafted")
        self.accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "of these, that full depth accepted")
        self.layer_tokens = self._counter("layer_tokens", "layers run for tokens, by client", "client")
        self.requests = self._counter("request_outcomes", "requests by how they ended", "outcome")
        self.refused = self._counter("requests_refused", "requests that were not taken in", "code")
        self.alarms = self._gauge("alarms", "1 while somebody should look", "kind", "client")
        self.agreement = self._gauge("shadow_agreement_ratio", "shadowed tokens that full depth would choose, too")
        self.shadowed = self._counter("shadow_tokens", "tokens that full depth has judged")

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", about, buckets=_SECONDS, registry=self._registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", about, labels, registry=self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", about, labels, registry=self._registry)

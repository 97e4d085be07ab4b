"""The life of a server: listen, load, serve, end."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_ee.config import Config
from megatron_ee.errors import StageLostError
from megatron_ee.inference.asking import Asking
from megatron_ee.inference.llm import open_model
from megatron_ee.server.app import create_app
from megatron_ee.server.commanders import Alone, Following, Leading
from megatron_ee.server.engine_loop import run_engine
from megatron_ee.server.guard.audit import AuditLog
from megatron_ee.server.guard.bounds import check_own_settings
from megatron_ee.server.guard.keys import KeyRing
from megatron_ee.server.listening import Listener, open_socket
from megatron_ee.server.offered import Offered
from megatron_ee.server.service import Service, State
from megatron_ee.server.templates import open_serving_template
from megatron_ee.server.watchers import Watcher

if TYPE_CHECKING:
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.opened import OpenedModel

_log = logging.getLogger("megatron_ee")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(folder: Path, config: Config) -> None:
    """Until a signal ends it.

    Raises:
        UserError: the address cannot be had, or a file not be read, or the model not be opened; or a request that says
            nothing would be out of bounds.
        StageLostError: another process of the model is gone.
    """
    check_own_settings(config.serving.bounds, config.inference)
    if os.environ.get("RANK", "0") == "0":
        _lead(folder, config)
    else:
        _follow(folder, config)


def _lead(folder: Path, config: Config) -> None:
    """The process that listens; it has the whole model, or a part of it."""
    front = _Front(config)
    reason = "the server has failed"
    try:
        with front.ends_by_signals():
            began = time.monotonic()
            model = open_model(folder, config)
            engine = _engine_of(model, config)
            bridge = front.service.bridge
            commander = Alone(bridge) if model.mesh is None else Leading(bridge, model.mesh.new_host_group())
            front.open(_offered(folder, config, model, engine))
            _log.info("ready after %.1f s: %s", time.monotonic() - began, front.url)
            run_engine(engine, commander, bridge.tell)
            if engine.is_lost:
                raise StageLostError("a stage of the model is lost, and with it the server")
            reason = "the server has ended"
    finally:
        front.close(reason)


def _follow(folder: Path, config: Config) -> None:
    """A process that has a part of the model, and does what the first one says until that ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # a launcher may have left them ignored
    model = open_model(folder, config)
    assert model.mesh is not None
    engine = _engine_of(model, config)
    group = model.mesh.new_host_group()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the first process drains, and says when it is over
    run_engine(engine, Following(group), lambda said: None)


class _Front:
    """Where clients are heard, before the model is there and as long as it is."""

    service: Service

    def __init__(self, config: Config) -> None:
        self._serving = serving = config.serving
        keys = None if serving.keys is None else KeyRing.read(serving.keys)
        self._watcher = Watcher(AuditLog(serving.audit), keys)
        self._listener = Listener(open_socket(serving.host, serving.port), self._make_app)
        self._listener.start()
        self.url = self._listener.url
        if keys is None and serving.host not in _LOOPBACK:
            _log.warning("%s: whoever reaches this address is served, since serving.keys is null", self.url)
        _log.info("listening at %s", self.url)

    def open(self, offered: Offered) -> None:
        self._call(lambda: self.service.open(offered, slots=offered.config.inference.max_batch_size))

    def close(self, reason: str) -> None:
        """Whoever still waits is told why in vain."""
        self._call(lambda: self.service.end(reason))
        self._listener.stop()

    @contextmanager
    def ends_by_signals(self) -> Iterator[None]:
        """The first one lets answers end; a later Ctrl-C does not. While the model is being loaded there are none."""
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        service = self.service
        if service.state is State.LOADING:
            raise SystemExit(128 + number)
        is_first = service.state is State.READY
        if not is_first and number == signal.SIGTERM:
            return  # scripts and schedulers tell every process of a server, and again
        seconds = self._serving.drain if is_first else 0.0
        if is_first:
            _log.info("%s: no more requests are taken in", signal.Signals(number).name)
        self._call(lambda: service.drain(seconds, service.bridge.stop))

    def _call(self, work: Any) -> None:
        self._listener.loop.call_soon_threadsafe(work)

    def _make_app(self, loop: Any) -> Any:
        self.service = Service(loop, self._watcher)
        return create_app(self.service, self._watcher, self._serving)


def _engine_of(model: "OpenedModel", config: Config) -> "Engine":
    from megatron_ee.inference.engines import make_engine  # imports megatron-core, which needs a chosen device

    inference = config.inference
    return make_engine(
        model,
        config,
        slots=inference.max_batch_size,
        capacity=_positions(model, config),
        max_pending=inference.exit.max_pending,
    )


def _positions(model: "OpenedModel", config: Config) -> int:
    """Of the longest prompt that may come, with its answer."""
    bounds = config.serving.bounds
    prompt = bounds.prompt_tokens or model.max_positions or config.data.sequence_length
    positions = prompt + bounds.new_tokens
    return positions if model.max_positions is None else min(positions, model.max_positions)


def _offered(folder: Path, config: Config, model: "OpenedModel", engine: "Engine") -> Offered:
    return Offered(
        name=config.serving.name or config.name,
        config=config,
        num_layers=config.model.num_layers,
        exits=model.exits,
        asking=Asking(config, model.tokenizer, model.begin, model.stop_token_ids),
        template=open_serving_template(config, folder, model.tokenizer),
        positions=_positions(model, config),
        check=engine.batch.begin,
        measures=tuple(sorted(model.measures)),
    )

"""stand-in"""
import math
from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError


class Streak:
    def __init__(self):
        self._token, self._count = None, 0

    def see(self, token):
        self._count = self._count + 1 if token == self._token else 1
        self._token = token
        return self._count


class ExitRule:
    def __init__(self, params: ExitParams, exits, gated=()):
        named = {*(params.exits or ()), *params.thresholds}
        if unknown := named - set(exits):
            raise FieldError("inference.exit", f"the model has exits after layers {list(exits)}, none after {sorted(unknown)}")
        allowed = exits if params.exits is None else params.exits
        ths = {l: params.thresholds.get(l, params.threshold) for l in allowed}
        self.thresholds = {} if params.mode == "full" else {l: v for l, v in ths.items() if l >= params.min_exit and v < 1}
        self.measure, self.patience, self.kv_policy, self.max_pending = params.measure, params.patience, params.kv_policy, params.max_pending

    @property
    def needs_choices(self):
        return self.patience > 1

    def fires(self, layer, confidence, streak):
        return confidence >= self.thresholds[layer] and streak >= self.patience

    def stops_at(self, exits):
        if self.measure == "cosine" and self.thresholds:
            return tuple(e for e in exits if e <= max(self.thresholds))
        return tuple(sorted(self.thresholds))

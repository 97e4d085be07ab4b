"""Which strategy serves many requests best, without a model: simulate_serving.py [CONFIG] [key.path=value ...] ...

    python tools/simulate_serving.py CONFIG --depths 2:.5,4:.5 --residents 16 64 --launch-rows 16
    python tools/simulate_serving.py --costs FILE --depths 2:.5,4:.5 --arrivals poisson --rate 20 --write-load LOAD
    python tools/simulate_serving.py --costs FILE --load LOAD --kv-policy fill
    python tools/simulate_serving.py --checkpoint RUN --recommend PROMPTS

The engine's own planner serves a load: so many requests, each with a prompt and an answer whose tokens leave after
given layers. Launches cost what --costs says, in seconds, or what the sizes of the config or of the checkpoint let
expect, in passes: a pass is what one token takes at full depth, alone.

With --recommend, the load is of your prompts: the checkpoint continues them at full depth, and every threshold says
from it how deep each token goes and whether it stays the same. Printed is which strategy and which threshold pay, as
YAML, or that none does. It is chosen on one half of the prompts and judged on the other. Costs are measured, unless
they are given.

With --stages, the model is cut into a pipeline, each stage in a process of its own; --record notes what each stage did,
which show_schedule.py --decoding draws.

Writes serving.json and serving.png into a folder. Not simulated: sampling, stop tokens, drafts.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from compare_measures import pictures_of
from serving_costs import Machine, machine_from_file, machine_from_sizes
from serving_load import add_load_options, fill_load_options, load_of, share, whole
from serving_runs import STRATEGIES, Setting, serve
from serving_stages import add_stage_options, check_stage_options, line_of, stops_of
from sweep_results import check_folder

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, KvPolicy, open_config
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.__main__ import split_settings
from megatron_ee.inference.decoding_record import Recorder, write_record
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.scheduling.bounds import (
    gain_of_rebatching,
    most_tokens_per_second,
    most_tokens_per_second_of_stages,
    reach_of,
)
from megatron_ee.inference.scheduling.report import Report, as_json
from megatron_ee.inference.scheduling.report_table import table
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.scheduling.workload import write_load
from megatron_ee.inference.stages import depths_of
from megatron_ee.log import quiet_dependencies

RECORD = "note what each stage did, for show_schedule.py --decoding FILE.json"
PROMPTS = "one a line that is not blank; or a .jsonl of objects with `prompt`, a text or a list of tokens"


def main() -> int:
    arguments = _parse()
    quiet_dependencies()
    try:
        if arguments.recommend:
            from serving_recommend import recommend

            recommend(arguments, _folder(arguments))
        else:
            simulate(arguments)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def simulate(arguments: argparse.Namespace) -> None:
    """Print a table for each number of residents, and write the files.

    Raises:
        FieldError: the load or the costs are wrong.
    """
    output = _folder(arguments)
    with _config(arguments) as config:
        if arguments.costs:
            machine = machine_from_file(arguments.costs, config)
        else:
            assert config is not None, "the command line has one of them"
            machine = machine_from_sizes(config)
        load = load_of(arguments, machine.exits, machine.num_layers)
        arguments.stops = stops_of(arguments, config, load, machine.num_layers)
    if arguments.write_load:
        write_load(arguments.write_load, load)
    print(f"{len(load)} requests, {sum(len(of.depths) for of in load)} tokens; {machine.said}")
    if len(arguments.stops) > 1:
        print(line_of(arguments.stops))
    elif arguments.record:
        raise FieldError("--record", "notes the stages of a pipeline, and there is none: --stages")
    recorder = Recorder() if arguments.record else None
    served = {}
    for residents in arguments.residents:
        served[residents] = {
            strategy: serve(load, machine, _setting(arguments, strategy, residents), recorder=recorder)
            for strategy in arguments.strategies
        }
        print("", *lines_of(load, machine, _setting(arguments, "lockstep", residents), served[residents]), sep="\n")
    content = {
        "costs": machine.said,
        "unit": "seconds" if arguments.costs else machine.unit.name,
        "launch_rows": arguments.launch_rows,
        "kv_policy": arguments.kv_policy,
        "stages": arguments.stops,
        "residents": {
            str(number): {name: as_json(of) for name, of in reports.items()} for number, reports in served.items()
        },
    }
    if recorder is not None:
        write_record(arguments.record, recorder.record)
        print(arguments.record)
    write(output, content)
    title = f"{len(load)} requests, {arguments.kv_policy}"
    draw(output / "serving.png", served, machine, title=title if load else "no requests")


def lines_of(
    load: Sequence[SimulatedRequest], machine: Machine, setting: Setting, reports: dict[str, Report]
) -> Iterator[str]:
    """The table of one number of residents, with what bounds it."""
    yield f"{setting.residents} residents, {setting.rows} rows a launch, {setting.kv_policy}"
    depths = [depth for of in load for depth in of.depths]
    if not depths:
        yield "no requests"
        return
    reach = reach_of(depths, machine.exits, machine.num_layers)
    bound = _bound(depths, machine, setting, prompt_rows=sum(of.prompt - 1 for of in load) / len(depths))
    yield from table(reports, unit=machine.unit, rate=machine.rate, bound=bound)
    whole = {segment: machine.costs.of(*segment, 1) for segment in reach}
    share_ = sum(reach[segment] * cost for segment, cost in whole.items()) / sum(whole.values())
    yield f"mean depth share {share_:.2f}: {1 / share_:.2f}x is the most over full depth, where rows cost nothing"
    if len(whole) == 2 and setting.residents <= setting.rows and setting.stages is None:
        gain = gain_of_rebatching(list(reach.values())[1], *whole.values())
        yield f"with no more residents than launch rows, rebatching gains {gain:.2f}x there"


def _bound(depths: Sequence[int], machine: Machine, setting: Setting, *, prompt_rows: float) -> float:
    rows: dict[str, Any] = {
        "launch_rows": setting.rows,
        "kv_policy": setting.kv_policy,
        "prompt_rows": prompt_rows,
    }
    if (stages := setting.stages) is None:
        return most_tokens_per_second(reach_of(depths, machine.exits, machine.num_layers), machine.costs, **rows)
    reach = reach_of(depths, depths_of(machine.exits, stages)[1:-1], machine.num_layers)
    costs = machine.costs.cut_at(stages.borders)
    return most_tokens_per_second_of_stages(reach, costs, stages, residents=setting.residents, **rows)


def write(output: Path, content: dict[str, Any]) -> None:
    path = output / "serving.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path)


def draw(path: Path, served: Mapping[int, Mapping[str, Report]], machine: Machine, *, title: str) -> None:
    """A picture, where there is what draws it."""
    try:
        from serving_picture import save_picture
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: it needs matplotlib: pip install 'megatron-ee[plots]'", file=sys.stderr)
        return
    save_picture(path, served, unit=machine.unit, rate=machine.rate, title=title)
    print(path)


@contextmanager
def _config(arguments: argparse.Namespace) -> Iterator[Config | None]:
    """Of the checkpoint, or the one that is named; None: neither is."""
    config_file, overrides = split_settings(arguments.settings)
    if arguments.checkpoint:
        folder = find_model(arguments.checkpoint)
        with open_decoding_config(folder, ["plugins=[]", *overrides], config_file=config_file) as config:
            yield config
    elif config_file:
        with open_config(config_file, overrides, read_model=read_model) as config:
            yield config
    else:
        yield None


def _folder(arguments: argparse.Namespace) -> Path:
    """
    Raises:
        UserError: nothing can be written to it.
    """
    of_run = pictures_of(find_model(arguments.checkpoint)) if arguments.checkpoint and not arguments.output else None
    output: Path = arguments.output or of_run or Path("runs/serving")
    check_folder(output)
    return output


def _setting(arguments: argparse.Namespace, strategy: str, residents: int) -> Setting:
    return Setting(strategy, residents, arguments.launch_rows, arguments.max_wait, arguments.kv_policy, arguments.stops)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="a run, a step or a Hugging Face folder")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="of launches, in seconds (docs/serving.md)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the run's pictures/, or runs/serving/")
    how = parser.add_argument_group("how it is served")
    how.add_argument(
        "--residents", type=whole(1), nargs="+", default=[16], metavar="N", help="sequences at a time (16)"
    )
    how.add_argument("--launch-rows", type=whole(1), metavar="N", help="tokens that fill a launch; default: residents")
    how.add_argument("--max-wait", type=whole(1), default=16, metavar="N", help="launches that a row waits (16)")
    how.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="default: all")
    how.add_argument("--kv-policy", choices=get_args(KvPolicy), default="recompute", help="(recompute)")
    add_stage_options(parser)
    parser.add_argument("--record", type=Path, metavar="FILE.json", help=RECORD)
    add_load_options(parser)
    advice = parser.add_argument_group("a recommendation")
    advice.add_argument("--recommend", type=Path, metavar="PROMPTS", help=PROMPTS)
    advice.add_argument("--agreement", type=share, metavar="X", help="least share of full depth's tokens (0.95)")
    advice.add_argument("--samples", type=whole(10), metavar="N", help="of the prompts, for the interval (50)")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    arguments = parser.parse_intermixed_args()
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    arguments.residents = list(dict.fromkeys(arguments.residents))
    arguments.strategies = [name for name in STRATEGIES if name in arguments.strategies]
    if arguments.recommend and not arguments.checkpoint:
        parser.error("--recommend needs the model: --checkpoint")
    if arguments.recommend and arguments.kv_policy == "propagate":
        parser.error("--kv-policy propagate changes tokens, which --recommend does not foresee")
    for name in ("agreement", "samples"):
        if getattr(arguments, name) is not None and not arguments.recommend:
            parser.error(f"--{name} goes with --recommend")
    has_config = bool(arguments.checkpoint or split_settings(arguments.settings)[0])
    if not has_config and not arguments.costs:
        parser.error("say what launches cost: --costs FILE, or a CONFIG or --checkpoint, whose sizes they follow")
    check_stage_options(parser, arguments, has_config=has_config)
    if arguments.record and (arguments.recommend or len(arguments.residents) * len(arguments.strategies) > 1):
        parser.error("--record is of one run: give one of --residents and one of --strategies")
    if arguments.settings and not has_config:
        parser.error("key.path=value changes a config: name one, or a checkpoint")
    fill_load_options(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())

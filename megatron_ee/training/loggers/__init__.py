"""Where a run's figures go: the console, metrics.jsonl (the record), and TensorBoard and Weights & Biases on demand.

All get the same figures under the same names:

    train/loss                                  the weighted sum of the exits' losses
    train/exit_<layer>/{loss,ppl,accuracy,weight}   every exit's, whatever stage computed it; the last is
                                                final, unless training.trains is exits
    train/unmasked_tokens                       what those are means over: the tokens since the last record
    train/{lr,grad_norm,tokens}                 tokens: all that the run has been through
    train/{skipped,loss_scale}                  steps since the last record whose gradients were no numbers, and which
                                                updated nothing: overflows of fp16's loss scale, or worse
    perf/{tokens_per_s,iter_time_s,seconds_left}   by the mean over ranks of a step, rank_wait included
    perf/{tokens_per_s_per_gpu,tflops_per_gpu,mfu}  on GPUs
    perf/slowest_rank_ratio                     of the ranks with the same work: see `alarms`
    time/{rank_wait,data,prepare,forward,exits,backward,weights,p2p_wait,grad_sync,optimizer,checkpoint}_s   see
                                                `phases`; with megatron-core's schedules forward_backward for five
    pipeline/{bubble_fraction,planned_bubble_fraction}   idle; the plan's at the speed measured, now and then
    pipeline/stage_<n>_busy_s                   each stage's work in a step
    memory/{peak_gib,stage_<n>_peak_gib}        the fullest rank of all, and of each stage (from 0)
    val/loss, val/exit_<layer>/*                as for training

A resumed run goes on where its checkpoint was: what had been logged beyond it is done again, and logged once.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_ee.config import Config, LoggingConfig
from megatron_ee.training.loggers.console import Console
from megatron_ee.training.loggers.interface import Figures, Logger
from megatron_ee.training.loggers.jsonlines import JsonLines
from megatron_ee.training.loggers.tensorboard import TensorBoard, require_tensorboard
from megatron_ee.training.loggers.wandb import WeightsAndBiases

__all__ = ["Console", "Figures", "JsonLines", "Logger", "TensorBoard", "WeightsAndBiases", "check_loggers"]
__all__ += ["open_loggers"]


def check_loggers(config: LoggingConfig) -> None:
    """Every rank calls it before anything is built, so that none is left waiting for one that gave up.

    Raises:
        UserError: the config asks for TensorBoard, and its package is missing.
    """
    if config.tensorboard:
        require_tensorboard()


def open_loggers(config: Config, run_folder: Path, *, exits: Sequence[int], start: int) -> list[Logger]:
    """All of a run's loggers, for the main rank.

    Args:
        exits: all that are trained, ascending.
        start: iterations that the run has done; 0 for a new one.
    """
    loggers: list[Logger] = [
        Console(exits, final_exit=config.model.num_layers, start=start, train_iters=config.training.train_iters),
        JsonLines(run_folder / "metrics.jsonl", start=start),
    ]
    if config.logging.tensorboard:
        loggers.append(TensorBoard(run_folder / "tensorboard", start=start))
    if config.logging.wandb is not None:
        loggers.append(WeightsAndBiases(config, run_folder))
    return loggers

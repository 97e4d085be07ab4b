"""Golden messages: what is said of a broken config, word for word and place for place.

Each case is the part of run.yaml that matters; what else a run needs is written below it (see `write`).
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config import ConfigError, load_config, open_config
from megatron_ee.config.__main__ import main
from megatron_ee.device import choose_device

REQUIRED = {
    "name": "name: run",
    "model": "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4}",
    "training": "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}",
}

# kind -> case -> the YAML, and each message without the file's name
Cases = dict[str, dict[str, tuple[str, ...]]]

ONE_FIELD: Cases = {
    "unknown key": {
        "at the root": ("optimiser: {lr: 1}", "1:1: optimiser: unknown key, did you mean 'optimizer'?"),
        "in a section": ("logging: {intervall: 5}", "1:11: logging.intervall: unknown key, did you mean 'interval'?"),
        "in a section of a section": (
            "exits:\n  weight_schedule:\n    warmup: 10",
            "3:5: exits.weight_schedule.warmup: unknown key, did you mean 'warmup_iters'?",
        ),
        "in a list's entry": (
            "data:\n  dataset:\n    - {path: a, weight: 1}\n    - {path: b, weigh: 1}",
            "4:17: data.dataset.1.weigh: unknown key, did you mean 'weight'?",
        ),
        "like none": ("model_parallel_size: 2", "1:1: model_parallel_size: unknown key"),
        "in a section that may be null": (
            "logging: {wandb: {projects: mine}}",
            "1:19: logging.wandb.projects: unknown key, did you mean 'project'?",
        ),
        "that is a number": ("exits: {3: 4}", "1:9: exits.3: unknown key"),
        "of two lines": ("data: {'a\\nb': 1}", "1:8: data.'a\\\\nb': unknown key"),
        "in place of a required one": (
            "model: {num_layrs: 8, hidden_size: 64, num_attention_heads: 4}",
            "1:9: model.num_layrs: unknown key, did you mean 'num_layers'?",
        ),
    },
    "duplicate key": {
        "in a section": (
            "data:\n  split: [1, 1, 1]\n  split: [2, 1, 1]",
            "3:3: data.split: given twice, first at run.yaml:2:3",
        ),
        "a section": ("seed: 1\nexits: {}\nexits: {}", "3:1: exits: given twice, first at run.yaml:2:1"),
    },
    "missing": {
        "a field": ("model: {hidden_size: 64, num_attention_heads: 4}", "1:1: model.num_layers: required, but missing"),
        "a field of a list's entry": (
            "parallel: {pipeline: 2, layout: [{layers: 4}, {exits_at_end: true}]}",
            "1:47: parallel.layout.1.layers: required, but missing",
        ),
        "a section": (
            "# a run\nname: run\ntraining: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}",
            "2:1: model: required, but missing",
        ),
    },
    "wrong type": {
        "a float for an integer": ("seed: 12.0", "1:1: seed: 12.0 is not an integer"),
        "a string for an integer": ('seed: "12"', "1:1: seed: '12' is not an integer"),
        "a boolean for an integer": ("seed: true", "1:1: seed: true is not an integer"),
        "leading zeros": ("seed: 010", "1:1: seed: '010' is not an integer"),
        "too many digits": (f"seed: {'9' * 99}", f"1:1: seed: '{'9' * 56}... is not an integer"),
        "yes for a boolean": ("checkpoint: {resume: yes}", "1:14: checkpoint.resume: 'yes' is not true or false"),
        "1 for a boolean": ("logging: {tensorboard: 1}", "1:11: logging.tensorboard: 1 is not true or false"),
        "a number for a string": ("runs: 3", "1:1: runs: 3 is not a string"),
        "a list for a string": ("runs: [a, b]", "1:1: runs: ['a', 'b'] is not a string"),
        "a quoted number": ("optimizer: {lr: '3e-4'}", "1:13: optimizer.lr: '3e-4' is not a number"),
        "a boolean for a probability": (
            "inference: {exit: {threshold: false}}",
            "1:20: inference.exit.threshold: false is not a number",
        ),
        "a boolean for the probability of an exit": (
            "inference: {exit: {thresholds: {6: true}}}",
            "1:33: inference.exit.thresholds.6: true is not a number",
        ),
        "a boolean for a count of exits": (
            "inference: {exit: {patience: true}}",
            "1:20: inference.exit.patience: true is not an integer",
        ),
        "booleans for numbers of sampling": (
            "inference: {sampling: {temperature: false, top_k: false, logit_bias: {3: true}, logprobs: true}}",
            "1:24: inference.sampling.temperature: false is not a number",
            "1:44: inference.sampling.top_k: false is not an integer",
            "1:71: inference.sampling.logit_bias.3: true is not a number",
            "1:81: inference.sampling.logprobs: true must be a non-negative integer or null",
        ),
        "a number for a boolean of sampling": (
            "inference: {sampling: {ignore_eos: 0}}",
            "1:24: inference.sampling.ignore_eos: 0 is not true or false",
        ),
        "a string for a list of strings": (
            "inference: {sampling: {stop: END}}",
            "1:24: inference.sampling.stop: 'END' is not a list",
        ),
        "a word for a key": (
            "inference: {exit: {thresholds: {six: 1}}}",
            "1:33: inference.exit.thresholds.six: the key 'six' is not an integer",
        ),
        "an integer for a list": ("exits: {layers: 4}", "1:9: exits.layers: 4 is not a list"),
        "a boolean for a list": ("exits: {weights: false}", "1:9: exits.weights: false is not a list"),
        "an integer for a list or null": (
            "inference: {exit: {exits: 3}}",
            "1:20: inference.exit.exits: 3 must be a list or null",
        ),
        "an integer for a list or a name": (
            "inference: {parallel: {layout: 4}}",
            "1:24: inference.parallel.layout: 4 must be 'equal', 'survival' or a list",
        ),
        "an integer for a list or auto": ("parallel: {layout: 3}", "1:12: parallel.layout: 3 must be 'auto' or a list"),
        "a string in a list": (
            "exits:\n  layers:\n    - 2\n    - four",
            "4:7: exits.layers.1: 'four' is not an integer",
        ),
        "a list for a section": ("parallel: [2, 2]", "1:1: parallel: [2, 2] is not a mapping"),
        "an integer in a list of sections": (
            "parallel: {layout: [4, {layers: 4}]}",
            "1:21: parallel.layout.0: 4 is not a mapping",
        ),
        "nothing for a section": ("exits:\n  # layers: [4]", "1:1: exits: null is not a mapping"),
        "a word for a number or auto": (
            "parallel: {data: aut}",
            "1:12: parallel.data: 'aut' must be a positive integer or 'auto'; did you mean 'auto'?",
        ),
        "not a number": ("optimizer: {lr: .nan}", "1:13: optimizer.lr: '.nan' is not a number"),
    },
    "out of range": {
        "zero": ("optimizer: {lr: 0}", "1:13: optimizer.lr: 0 must be a positive number"),
        "a stage without layers": (
            "inference: {parallel: {pipeline: 2, layout: [8, 0]}}",
            "1:49: inference.parallel.layout.1: 0 must be a positive integer",
        ),
        "zero stages": ("parallel: {pipeline: 0}", "1:12: parallel.pipeline: 0 must be a positive integer"),
        "zero or auto": ("parallel: {data: 0}", "1:12: parallel.data: 0 must be a positive integer or 'auto'"),
        "negative": ("checkpoint: {interval: -1}", "1:14: checkpoint.interval: -1 must be a non-negative integer"),
        "a seed beyond 32 bits": (
            "seed: 4294967296",
            "1:1: seed: 4294967296 must be an integer at least 0 and below 4294967296",
        ),
        "negative in a list": ("exits: {weights: [-1]}", "1:19: exits.weights.0: -1 must be a non-negative number"),
        "negative number": (
            "optimizer: {weight_decay: -0.1}",
            "1:13: optimizer.weight_decay: -0.1 must be a non-negative number",
        ),
        "probability": (
            "inference: {exit: {threshold: 1.5}}",
            "1:20: inference.exit.threshold: 1.5 must be a number at least 0 and at most 1",
        ),
        "probability of an exit": (
            "inference: {exit: {thresholds: {6: -0.5}}}",
            "1:33: inference.exit.thresholds.6: -0.5 must be a number at least 0 and at most 1",
        ),
        "no exit in a row": (
            "inference: {exit: {patience: 0}}",
            "1:20: inference.exit.patience: 0 must be a positive integer",
        ),
        "no pending position": (
            "inference: {exit: {max_pending: 0}}",
            "1:20: inference.exit.max_pending: 0 must be a positive integer",
        ),
        "no probability to sample from": (
            "inference: {sampling: {top_p: 0}}",
            "1:24: inference.sampling.top_p: 0 must be a number above 0 and at most 1",
        ),
        "a penalty": (
            "inference: {sampling: {frequency_penalty: -2.5}}",
            "1:24: inference.sampling.frequency_penalty: -2.5 must be a number at least -2 and at most 2",
        ),
        "an infinite bias": (
            "inference: {sampling: {logit_bias: {7: 1e999}}}",
            "1:37: inference.sampling.logit_bias.7: inf is not a finite number",
        ),
        "a bias of no token": (
            "inference: {sampling: {logit_bias: {-7: 1.0}}}",
            "1:37: inference.sampling.logit_bias.-7: the key -7 must be a non-negative integer",
        ),
        "a string of nothing": (
            "inference: {sampling: {stop: [END, '']}}",
            "1:36: inference.sampling.stop.1: '' must be a non-empty string",
        ),
        "beta": ("optimizer: {beta1: 1.0}", "1:13: optimizer.beta1: 1.0 must be a number at least 0 and below 1"),
        "infinite": ("optimizer: {lr: 1e999}", "1:13: optimizer.lr: inf is not a finite number"),
        "too few in a list": ("data: {split: [90, 10]}", "1:8: data.split: [90, 10] must be a list of 3"),
        "an empty list": ("data: {dataset: []}", "1:8: data.dataset: [] must be a string or a non-empty list"),
        "too many in a list": ("data: {split: [1, 2, 3, 4]}", "1:8: data.split: [1, 2, 3, 4] must be a list of 3"),
        "key": (
            "inference: {exit: {thresholds: {0: 0.5}}}",
            "1:33: inference.exit.thresholds.0: the key 0 must be a positive integer",
        ),
        "name of a run": (
            "name: my run\n" + "\n".join((REQUIRED["model"], REQUIRED["training"])),
            "1:1: name: 'my run' must be a string that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        ),
    },
    "wrong name": {
        "boolean of YAML 1.1": ("device: off", "1:1: device: 'off' must be 'auto', 'cpu' or 'cuda'"),
        "device": ("device: gpu", "1:1: device: 'gpu' must be 'auto', 'cpu' or 'cuda'"),
        "precision": (
            "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2, precision: bf-16}",
            "1:72: training.precision: 'bf-16' must be 'fp32', 'bf16' or 'fp16'; did you mean 'bf16'?",
        ),
        "projection": (
            "exits: {projection: share}",
            "1:9: exits.projection: 'share' must be 'shared', 'own' or a list; did you mean 'shared'?",
        ),
        "measure": (
            "inference: {exit: {measure: entropie}}",
            "1:20: inference.exit.measure: 'entropie' must be 'max_probability', 'margin', 'entropy', 'cosine', 'gate' "
            "or a plug-in's; did you mean 'entropy'?",
        ),
        "missing keys and values": (
            "inference: {exit: {kv_policy: copy}}",
            "1:20: inference.exit.kv_policy: 'copy' must be 'recompute', 'fill' or 'propagate'",
        ),
        "mode": (
            "inference: {exit: {mode: speculation}}",
            "1:20: inference.exit.mode: 'speculation' must be 'full', 'early_exit', 'speculative', 'sled' or 'dola'; "
            "did you mean 'speculative'?",
        ),
        "draft": (
            "inference: {exit: {draft_exit: first, draft_length: 0}}",
            "1:20: inference.exit.draft_exit: 'first' must be a positive integer or 'auto'",
            "1:39: inference.exit.draft_length: 0 must be a positive integer or 'auto'",
        ),
        "layout of decoding": (
            "inference: {parallel: {layout: survive}}",
            "1:24: inference.parallel.layout: 'survive' must be 'equal', 'survival' or a list; "
            "did you mean 'survival'?",
        ),
        "schedule": (
            "parallel: {schedule: interleave}",
            "1:12: parallel.schedule: 'interleave' must be '1f1b', 'gpipe', 'interleaved', 'filled-1f1b', "
            "'zero-bubble', 'megatron' or a plug-in's; "
            "did you mean 'interleaved'?",
        ),
    },
}

BETWEEN_FIELDS: Cases = {
    "data": {
        "validation of documents": (
            "data: {validation: a.jsonl}",
            "1:8: data.validation: needs data.format messages: of documents, data.split says which are for validation",
        ),
        "a template for documents": (
            "data: {chat_template: a.jinja}",
            '1:8: data.chat_template: "a.jinja" needs data.format messages, not documents',
        ),
        "documents apart": (
            "data: {packing: false}",
            "1:8: data.packing: false needs data.format messages, not documents",
        ),
        "messages without a file": (
            "data: {format: messages}",
            "1:1: data.dataset: 'python-stdlib' must be a .jsonl or .jsonl.gz of conversations for format messages",
        ),
        "messages of another kind": (
            "data: {format: messages, dataset: a.jsonl.gz, validation: a.txt}",
            "1:47: data.validation: 'a.txt' must be a .jsonl or .jsonl.gz of conversations for format messages",
        ),
        "a blend of messages": (
            "data: {format: messages, dataset: [{path: a, weight: 1}]}",
            "1:26: data.dataset: format messages takes one .jsonl, not a list",
        ),
    },
    "exits": {
        "beyond the model": ("exits: {layers: [4, 9]}", "1:21: exits.layers.1: 9 must be below num_layers = 8"),
        "at the last layer": (
            "exits: {layers: [4, 8]}",
            "1:21: exits.layers.1: 8 must be below num_layers = 8: the last layer's exit is built in",
        ),
        "twice": ("exits: {layers: [4, 4]}", "1:9: exits.layers: [4, 4] must ascend, without duplicates"),
        "not ascending": ("exits: {layers: [4, 2]}", "1:9: exits.layers: [4, 2] must ascend, without duplicates"),
        "more weights than exits": (
            "exits: {layers: [4], weights: [0.5, 0.5]}",
            "1:22: exits.weights: 2 weights, but exits.layers has 1",
        ),
        "lists of another length": (
            "exits: {layers: [2, 4], weight_schedule: [{}], temperature: [2.0, 1.0, 1.0], gate: [mlp]}",
            "1:25: exits.weight_schedule: 1 schedule, but exits.layers has 2",
            "1:48: exits.temperature: 3 temperatures, but exits.layers has 2",
            "1:78: exits.gate: 1 gate, but exits.layers has 2",
        ),
        "learning from a final exit elsewhere": (
            "exits: {layers: [2, 6], distillation: {}, gate: linear, gate_loss: {target: final}}\n"
            "parallel: {pipeline: 2, layout: [{layers: 4}, {layers: 4}]}",
            "1:25: exits.distillation: needs the final exit beside the one that learns from it, but exit 2 is on stage "
            "0 and the final exit on stage 1",
            "1:69: exits.gate_loss.target: needs the final exit beside the one that learns from it, but exit 2 is on "
            "stage 0 and the final exit on stage 1",
        ),
        "gates that are not there": (
            "exits: {layers: [2, 4], gate: [linear, none]}\ninference: {exit: {measure: gate}}",
            "2:20: inference.exit.measure: gate, but exits.gate is none for the exits after layers [4]",
        ),
        "of a request": (
            "exits: {layers: [2, 4]}\ninference: {exit: {exits: [2, 3], thresholds: {6: 0.5}}}",
            "2:31: inference.exit.exits.1: there is no exit after layer 3, only after [2, 4]",
            "2:48: inference.exit.thresholds.6: there is no exit after layer 6, only after [2, 4]",
        ),
        "of a request, but of no model": (
            "inference: {exit: {exits: [2]}}",
            "1:28: inference.exit.exits.0: there is no exit after layer 2: exits.layers is empty",
        ),
    },
    "drafts": {
        "of an exit that is not there": (
            "exits: {layers: [2, 4]}\ninference: {exit: {draft_exit: 3}}",
            "2:20: inference.exit.draft_exit: there is no exit after layer 3, only after [2, 4]",
        ),
        "of no exit at all": (
            "inference: {exit: {mode: speculative}}",
            "1:20: inference.exit.mode: speculative, but no exit is there, so none may draft",
        ),
        "of none that may": (
            "exits: {layers: [2, 4]}\ninference: {exit: {mode: speculative, min_exit: 5}}",
            "2:20: inference.exit.mode: speculative, but none of the exits after layers [2, 4] may draft",
        ),
        "longer than may wait": (
            "exits: {layers: [2]}\ninference: {exit: {mode: speculative, draft_length: 300}}",
            "2:39: inference.exit.draft_length: 300 must be at most max_pending = 256",
        ),
    },
    "sampling": {
        "more tokens at least than at most": (
            "inference: {sampling: {max_new_tokens: 8, min_new_tokens: 9}}",
            "1:43: inference.sampling.min_new_tokens: 9 must be at most max_new_tokens = 8",
        ),
    },
    "LayerSkip's recipe": {
        "beside weights of one's own": (
            "exits:\n  layers: all\n  weights: [1, 1, 1, 1, 1, 1, 1]\n  weight_schedule: {shape: constant}\n"
            "  layerskip: {}",
            "3:3: exits.weights: is what exits.layerskip replaces: leave it out",
            "4:3: exits.weight_schedule: is what exits.layerskip replaces: leave it out",
        ),
        "without exits": (
            "exits: {layerskip: {scale: 1}}",
            "1:9: exits.layerskip: needs exits, but exits.layers is empty",
        ),
        "a rotation of another curriculum": (
            "exits: {layers: all, layerskip: {curriculum: gradual, rotation: 8}}",
            "1:55: exits.layerskip.rotation: 8 is for curriculum rotational, not gradual",
        ),
        "no rotation": (
            "exits: {layers: all, layerskip: {rotation: null}}",
            "1:34: exits.layerskip.rotation: null, but curriculum rotational needs a number of layers",
        ),
        "one norm for other heads": (
            "exits: {layers: [2, 4], norm: shared, head: [norm, mlp]}",
            "1:25: exits.norm: shared needs exits that are no more than a norm, not head mlp",
        ),
        "all layers of a broken model": (
            "exits: {layers: all, head: [mlp], projection: both}\nmodel: {num_layers: 0, hidden_size: 64, "
            "num_attention_heads: 4}",
            "1:35: exits.projection: 'both' must be 'shared', 'own' or a list",
            "2:9: model.num_layers: 0 must be a positive integer",
        ),
        "always skipped": (
            "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2, layer_dropout: {maximum: 1}}",
            "1:88: training.layer_dropout.maximum: 1 must be a number at least 0 and below 1",
        ),
    },
    "heads": {
        "over tensor-parallel ranks": (
            "parallel: {tensor: 3}\nmodel:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4",
            "5:3: model.num_attention_heads: 4 doesn't divide over parallel.tensor = 3 ranks",
        ),
        "of keys and values over tensor-parallel ranks": (
            "parallel: {tensor: 4}\n"
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2}",
            "2:65: model.num_key_value_heads: 2 doesn't divide over parallel.tensor = 4 ranks",
        ),
        "in the hidden size": (
            "model: {num_layers: 8, hidden_size: 66, num_attention_heads: 4}",
            "1:24: model.hidden_size: 66 doesn't divide over 4 heads, nor is head_dim set",
        ),
        "of keys and values": (
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 3}",
            "1:65: model.num_key_value_heads: 3 must divide num_attention_heads = 4",
        ),
        "of odd width": (
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, head_dim: 15}",
            "1:65: model.head_dim: 15 must be even: rotary positions turn pairs of channels",
        ),
    },
    "windows": {
        "beyond the last layer": (
            "model:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4\n  sliding_window: 16\n"
            "  sliding_window_layers: [2, 9]",
            "6:30: model.sliding_window_layers.1: 9 is beyond num_layers = 8",
        ),
        "of layer 0": (
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, sliding_window: 16, "
            "sliding_window_layers: [0]}",
            "1:109: model.sliding_window_layers.0: 0 must be a positive integer",
        ),
        "without a width": (
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, sliding_window_layers: [1]}",
            "1:65: model.sliding_window_layers: [1] needs sliding_window, which is null",
        ),
        "that do not ascend": (
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, sliding_window: 9, "
            "sliding_window_layers: [3, 1]}",
            "1:84: model.sliding_window_layers: [3, 1] must ascend, without duplicates",
        ),
    },
    "rotary positions": {
        "beyond what the model is made for": (
            "data:\n  sequence_length: 4096\n"
            "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 2048}",
            "2:3: data.sequence_length: 4096 is beyond model.max_position_embeddings = 2048",
        ),
        "slow that are fast": (
            "model:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4\n"
            "  rope_scaling: {kind: llama3, factor: 8, low_freq_factor: 4}",
            "5:43: model.rope_scaling.low_freq_factor: 4.0 must be below high_freq_factor = 4.0",
        ),
        "a ramp that goes nowhere": (
            "model:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4\n"
            "  rope_scaling: {kind: yarn, factor: 8, original_max_position_embeddings: 64, beta_slow: 33}",
            "5:79: model.rope_scaling.beta_slow: 33.0 must be below beta_fast = 32.0",
        ),
        "all of one frequency": (
            "model:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4\n  rope_theta: 1\n"
            "  rope_scaling: {kind: yarn, factor: 8, original_max_position_embeddings: 64}",
            "5:3: model.rope_theta: 1.0 must be above 1 for rope_scaling of kind yarn",
        ),
        "of a kind that is not known": (
            "model:\n  num_layers: 8\n  hidden_size: 64\n  num_attention_heads: 4\n"
            "  rope_scaling: {kind: dynamic, factor: 8}",
            "5:18: model.rope_scaling.kind: 'dynamic' must be 'linear', 'llama3' or 'yarn'",
        ),
    },
    "vocabulary": {
        "over tensor-parallel ranks": (
            "parallel: {tensor: 4}\nmodel: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, vocab_size: 321}",
            "2:65: model.vocab_size: 321 doesn't divide over parallel.tensor = 4 ranks",
        ),
        "auto, over tensor-parallel ranks": (
            "parallel: {tensor: 3}\n"
            "model: {num_layers: 8, hidden_size: 96, num_attention_heads: 6, ffn_hidden_size: 96}",
            "2:1: model.vocab_size: auto, a multiple of 64, may not divide over parallel.tensor = 3 ranks: set it",
        ),
    },
    "positions": {
        "over tensor-parallel ranks": (
            "parallel: {tensor: 2, sequence: true}\ndata: {sequence_length: 127}",
            "2:8: data.sequence_length: 127 doesn't divide over parallel.tensor = 2 ranks",
        ),
        "over one rank": (
            "parallel: {sequence: true}",
            "1:12: parallel.sequence: true needs parallel.tensor of at least 2, not 1",
        ),
    },
    "layers": {
        "fewer than stages": (
            "parallel: {pipeline: 9}",
            "1:12: parallel.pipeline: 9 stages need at least 9 layers, not 8",
        ),
        "fewer than chunks": (
            "parallel: {pipeline: 4, chunks: 3, schedule: interleaved}",
            "1:25: parallel.chunks: 4 stages x 3 chunks need at least 12 layers, not 8",
        ),
        "of a layout": (
            "parallel: {pipeline: 2, layout: [{layers: 3}, {layers: 6}]}",
            "1:25: parallel.layout: its layers add up to 9, not to num_layers = 8",
        ),
        "of a layout with too few entries, and of too few layers": (
            "parallel: {pipeline: 2, layout: [{layers: 3}]}",
            "1:25: parallel.layout: needs an entry for each of 2 stages, not 1",
            "1:25: parallel.layout: its layers add up to 3, not to num_layers = 8",
        ),
        "of a layout with too few entries": (
            "parallel:\n  pipeline: 2\n  chunks: 2\n  schedule: interleaved\n  layout: [{layers: 4}, {layers: 4}]",
            "5:3: parallel.layout: needs an entry for each of 2 stages x 2 chunks, not 2",
        ),
    },
    "stages of decoding": {
        "more than layers": (
            "inference: {parallel: {pipeline: 9}}",
            "1:24: inference.parallel.pipeline: 9 stages need at least 9 layers, not 8",
        ),
        "of too few entries, and of too many layers": (
            "inference: {parallel: {pipeline: 3, layout: [2, 7]}}",
            "1:37: inference.parallel.layout: needs a number of layers for each of 3 stages, not 2 of them",
            "1:37: inference.parallel.layout: its layers add up to 9, not to num_layers = 8",
        ),
        "of a list alone": (
            "inference: {parallel: {layout: [2, 6]}}",
            "1:24: inference.parallel.layout: needs a number of layers for the one stage, not 2 of them",
        ),
        "by survival, without depths": (
            "inference: {parallel: {pipeline: 2, layout: survival}}",
            "1:13: inference.parallel.depths: null, but layout survival needs a file that "
            "python -m megatron_ee.inference --depths wrote",
        ),
        "with depths that nobody reads": (
            "inference: {parallel: {pipeline: 2, layout: [3, 5], depths: depths.json}}",
            "1:53: inference.parallel.depths: 'depths.json' is for layout survival, not [3, 5]",
        ),
        "all alike, with depths": (
            "inference: {parallel: {depths: depths.json}}",
            "1:24: inference.parallel.depths: 'depths.json' is for layout survival, not equal",
        ),
    },
    "an exit on a border": {
        "of neither side": (
            "exits: {layers: [4]}\nparallel: {pipeline: 2, layout: [{layers: 4, exits_at_end: false}, {layers: 4}]}",
            "2:25: parallel.layout: exit 4 is on the border of entries 0 and 1 and is given to neither: "
            "set either exits_at_end of the first or exits_at_start of the second, and not both",
        ),
        "of the right side, with an MLP": (
            "exits: {layers: [4], head: mlp}\n"
            "parallel: {pipeline: 2, layout: [{layers: 4, exits_at_end: false}, {layers: 4, exits_at_start: true}]}",
            "2:80: parallel.layout.1.exits_at_start: exit 4 has an MLP head, which reads the inside of layer 4: "
            "leave it to entry 0",
        ),
    },
    "heads of exits": {
        "another number than exits": (
            "exits: {layers: [2, 4], head: [mlp], projection: [own, own, own]}",
            "1:25: exits.head: 1 head, but exits.layers has 2",
            "1:38: exits.projection: 3 projections, but exits.layers has 2",
        ),
        "of no kind": (
            "exits: {layers: [2], head: [attention]}",
            "1:29: exits.head.0: 'attention' must be 'norm', 'mlp' or 'block'",
        ),
    },
    "recomputation": {
        "of no part": (
            "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2, recompute_modules: []}",
            "1:72: training.recompute_modules: [] must be a non-empty list",
        ),
    },
    "schedule": {
        "fills for one stage": (
            "parallel: {schedule: filled-1f1b}",
            "1:12: parallel.schedule: filled-1f1b needs pipeline of at least 2, not 1: one stage is never idle",
        ),
        "zero-bubble on one stage": (
            "parallel: {schedule: zero-bubble}",
            "1:12: parallel.schedule: zero-bubble needs pipeline of at least 2, not 1: one stage waits for no gradient",
        ),
        "zero-bubble with chunks": (
            "parallel: {pipeline: 2, chunks: 2, schedule: zero-bubble}",
            "1:25: parallel.chunks: 2 chunks need schedule interleaved, not zero-bubble",
        ),
        "megatron's, with chunks on one stage": (
            "parallel: {schedule: megatron, chunks: 2}",
            "1:32: parallel.chunks: 2 chunks need pipeline of at least 2, not 1",
        ),
        "megatron's, which always releases": (
            "exits: {layers: [2], release: true}\nparallel: {schedule: megatron}",
            "1:22: exits.release: true is what schedule megatron always does; leave it out",
        ),
        "a distributed optimizer, and a plug-in's": (
            "plugins: [mine.py]\noptimizer: {backend: mine}\nparallel: {distributed_optimizer: true}",
            "3:12: parallel.distributed_optimizer: true needs optimizer.backend megatron, not mine",
        ),
        "a distributed optimizer, and DeepSpeed's": (
            "optimizer: {backend: deepspeed}\nparallel: {distributed_optimizer: true}",
            "2:12: parallel.distributed_optimizer: true needs optimizer.backend megatron, not deepspeed; it shares the "
            "state by itself",
        ),
        "sums that begin early, and DeepSpeed's own": (
            "optimizer: {backend: deepspeed}\nparallel: {overlap_grad_reduce: true}",
            "2:12: parallel.overlap_grad_reduce: true begins sums over data ranks that optimizer.backend deepspeed "
            "makes itself, after the backward",
        ),
        "a stage of ZeRO with a backward of its own": (
            "optimizer: {backend: deepspeed, deepspeed: {stage: 2}}",
            "1:45: optimizer.deepspeed.stage: 2 must be 1: beyond it DeepSpeed cuts up gradients within a backward of "
            "its own, and here the pipeline runs the backward",
        ),
        "settings of a backend that is not chosen": (
            "optimizer: {deepspeed: {offload: cpu}}",
            "1:13: optimizer.deepspeed: needs optimizer.backend deepspeed, not megatron",
        ),
        "DeepSpeed's own pipeline": (
            "parallel: {schedule: deepspeed}",
            "1:12: parallel.schedule: DeepSpeed's pipeline runs models of its own, without exits: it is an "
            "optimizer.backend alone",
        ),
        "traced after its end": (
            "logging: {trace_iterations: [3, 11]}",
            "1:33: logging.trace_iterations.1: 11 is beyond training.train_iters = 10",
        ),
        "profiled after its end": (
            "logging: {profile: {start: 9, iterations: 3}}",
            "1:11: logging.profile: ends with 11, beyond training.train_iters = 10",
        ),
        "profiled before its begin": (
            "logging: {profile: {start: 0}}",
            "1:21: logging.profile.start: 0 must be a positive integer",
        ),
        "megatron's, traced": (
            "logging: {trace_iterations: [1]}\nparallel: {schedule: megatron}",
            "1:11: logging.trace_iterations: schedule megatron shows no actions to trace",
        ),
        "chunks without interleaved": (
            "parallel: {pipeline: 2, chunks: 2}",
            "1:25: parallel.chunks: 2 chunks need schedule interleaved, not 1f1b",
        ),
        "interleaved without chunks": (
            "parallel: {pipeline: 2, schedule: interleaved}",
            "1:25: parallel.schedule: interleaved needs pipeline and chunks of at least 2, not 2 and 1",
        ),
    },
    "batch": {
        "over micro-batches": (
            "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 3}",
            "1:29: training.global_batch_size: 8 must be a multiple of micro_batch_size = 3",
        ),
        "over data-parallel ranks": (
            "parallel: {data: 3}",
            "4:29: training.global_batch_size: 8 must be a multiple of micro_batch_size x parallel.data = 2 x 3",
        ),
        "over stages of the interleaved schedule": (
            "parallel: {pipeline: 3, chunks: 2, schedule: interleaved}",
            "4:29: training.global_batch_size: makes 4 micro-batches a step, "
            "but schedule interleaved needs a multiple of the 3 stages",
        ),
    },
    "learning rate": {
        "smallest above the largest": (
            "optimizer: {lr: 1e-3, min_lr: 1e-2}",
            "1:23: optimizer.min_lr: 0.01 must be at most lr = 0.001",
        ),
        "cool-down": (
            "optimizer: {lr_decay: wsd, lr_cooldown_iters: 11}",
            "1:28: optimizer.lr_cooldown_iters: 11 must be positive and fit, with the warm-up, into train_iters = 10",
        ),
    },
}

# case -> (YAML, options and overrides of the command, its one line)
FOUND_IN_USE = {
    "processes that don't divide into stages": (
        "parallel:\n  pipeline: 2",
        "--world-size 3",
        "run.yaml:2:3: parallel.pipeline: 3 processes don't divide into 2 stages",
    ),
    "processes that don't divide into stages of several ranks": (
        "parallel: {tensor: 2, pipeline: 2}",
        "--world-size 6",
        "run.yaml:1:23: parallel.pipeline: 6 processes don't divide into 2 stages of 2 tensor-parallel ranks",
    ),
    "processes that don't divide into tensor-parallel ranks": (
        "parallel: {tensor: 2}",
        "--world-size 3",
        "run.yaml:1:12: parallel.tensor: 3 processes don't divide into 1 stage of 2 tensor-parallel ranks",
    ),
    "another number of processes than is written": (
        "parallel: {pipeline: 2, data: 2}",
        "--world-size 8",
        "run.yaml:1:25: parallel.data: 2 x 2 stages need 4 processes, not 8",
    ),
    "data-parallel ranks that don't divide the batch": (
        "seed: 1",
        "--world-size 3",
        "run.yaml:4:29: training.global_batch_size: 8 must be a multiple of micro_batch_size x data-parallel ranks = "
        "2 x 3",
    ),
    "a vocabulary smaller than the tokenizer's": (
        "model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, vocab_size: 256}",
        "--estimate",
        "run.yaml:1:65: model.vocab_size: 256 is below the tokenizer's 258 tokens",
    ),
    "no tokenizer": (
        "data:\n  tokenizer: byte",
        "--estimate",
        "run.yaml:2:3: data.tokenizer: 'byte' is neither 'bytes' nor the path of a tokenizer.json or of a tokenizer's "
        "folder",
    ),
    "a tokenizer that cannot be a path": (
        'data:\n  tokenizer: "\\0"',
        "--estimate",
        "run.yaml:2:3: data.tokenizer: '\\x00' is neither 'bytes' nor the path of a tokenizer.json or of a tokenizer's "
        "folder",
    ),
    "no file of costs": (
        "parallel:\n  costs: estimate",
        "--estimate",
        "run.yaml:2:3: parallel.costs: estimate does not exist; tools/measure_costs.py writes such files",
    ),
    "costs in a file of something else": (
        "parallel: {costs: run.yaml}",
        "--estimate",
        "run.yaml:1:12: parallel.costs: run.yaml is no file of tools/measure_costs.py, or is damaged "
        "(Expecting value: line 1 column 1 (char 0))",
    ),
    "an estimate of a plug-in's schedule": (
        "plugins: [mine.py]\nparallel: {schedule: mine}",
        "--estimate",
        "run.yaml:2:12: parallel.schedule: --estimate knows 1f1b, gpipe, interleaved, filled-1f1b, "
        "zero-bubble, megatron, not the plug-in's 'mine'",
    ),
}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # messages then begin with a bare file name


def write(text: str) -> None:
    """run.yaml: the text, and below it the required sections that it lacks. With a name it is all there is."""
    keys = {line.partition(":")[0] for line in text.splitlines()}
    lacking = [] if "name" in keys else [section for key, section in REQUIRED.items() if key not in keys]
    Path("run.yaml").write_text("\n".join([text, *lacking, ""]))


def flat(cases: Cases) -> list[Any]:
    return [
        pytest.param(text, messages, id=f"{kind}: {what}")
        for kind, of_kind in cases.items()
        for what, (text, *messages) in of_kind.items()
    ]


@pytest.mark.parametrize(("text", "messages"), flat(ONE_FIELD) + flat(BETWEEN_FIELDS))
def test_a_broken_config_is_explained_where_it_is_broken(text: str, messages: list[str]) -> None:
    write(text)
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert caught.value.problems == [f"run.yaml:{message}" for message in messages]


@pytest.mark.parametrize(("text", "arguments", "line"), FOUND_IN_USE.values(), ids=FOUND_IN_USE)
def test_what_only_a_use_finds_is_explained_where_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, arguments: str, line: str
) -> None:
    write(text)
    monkeypatch.setattr(sys, "argv", ["config", "run.yaml", *arguments.split()])
    assert main() == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_more_ranks_than_gpus_are_explained_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write("seed: 1\ndevice: cuda")
    with pytest.raises(ConfigError) as caught, open_config("run.yaml") as config:
        choose_device(config.device)
    assert caught.value.problems == [
        "run.yaml:2:1: device: cuda needs a GPU for every local rank; found 2 local ranks, 0 GPUs"
    ]

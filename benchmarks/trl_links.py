"""Records losses and gradients of TRL's trainers on random ragged pairs, for tests/algorithms/test_links.py.

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    trl/bin/python benchmarks/trl_links.py tests/fixtures/trl_links.json

The trainers' own loss methods run in fp64 on a model that looks up its log-probs in a table. Gradients are those of the
mean over pairs (KTO: over samples) with respect to each log-prob. Losses with a term of -log pi are computed pair by
pair, because TRL averages that term over the tokens of a batch.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from accelerate import Accelerator
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTHS = ((5, 3), (2, 7), (4, 4), (8, 1), (3, 6))
"""Tokens of the chosen and the rejected response of each pair."""
DPO = {
    "sigmoid": {"beta": 0.3},
    "sigmoid_norm": {"beta": 2.0},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.2},
    "hinge": {"beta": 0.7},
    "exo_pair": {"beta": 0.3, "label_smoothing": 0.05},
    "nca_pair": {"beta": 0.3},
    "bco_pair": {"beta": 0.3},
    "sppo_hard": {"beta": 0.4},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "ld": {"beta": 0.3, "ld_alpha": 0.4},
}
CPO = {
    "cpo": {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7},
    "cdpo_without_reference": {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
}
KTO = {
    "kto": {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.8, "calculate_KL": True},
    "apo_zero_unpaired": {
        "loss_type": "apo_zero_unpaired",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "calculate_KL": False,
    },
}


class Table:
    """A model that gives token 0 the table's log-prob and token 1 the rest, so each log-prob has its own gradient."""

    def __init__(self, lengths, generator, gradient):
        width = max(lengths)
        self.mask = torch.tensor([[t < length for t in range(width)] for length in lengths])
        random = torch.rand(len(lengths), width, generator=generator, dtype=torch.float64)
        self.logprobs = (-0.1 - 1.5 * random).requires_grad_(gradient)

    def __call__(self, *_, **__):
        kept = self.logprobs * self.mask
        logits = torch.stack([self.logprobs, torch.log1p(-self.logprobs.exp())], dim=-1)
        nothing = torch.zeros_like(kept)
        return SimpleNamespace(
            log_probs=kept,
            logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1),  # the last position predicts nothing
            entropy=nothing,
            mean_logits=nothing,
            is_top1=self.mask,
        )

    def inputs(self):
        row = torch.cat([torch.zeros(len(self.mask), 1, dtype=torch.bool), self.mask], dim=1).long()
        return {"input_ids": torch.zeros_like(row), "attention_mask": torch.ones_like(row), "completion_mask": row}

    def rows(self, values):
        return [
            [round(x, 10) for x in row[mask].tolist()] for row, mask in zip(values.detach(), self.mask, strict=True)
        ]


def part(table, rows):
    """Return some of the table's rows, with its parameters."""
    piece = object.__new__(Table)
    width = int(table.mask[rows].sum(1).max())
    piece.mask, piece.logprobs = table.mask[rows, :width], table.logprobs[rows, :width]
    return piece


def trainer(kind, **options):
    """Return a trainer with only the attributes that its loss reads."""
    instance = object.__new__(kind)
    defaults = {
        "accelerator": Accelerator(cpu=True),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "use_weighting": False,
        "ld_alpha": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "loss_weights": [1.0],
        "alpha": 0.0,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "padding_value": 0,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(instance).update(defaults | options)
    return instance


def pair_batch(table):
    """Return a table's rows as CPO's and ORPO's batch of one pair."""
    batch = {}
    for side, mask in zip(("chosen", "rejected"), table.mask, strict=True):
        length = int(mask.sum()) + 1
        ids = torch.zeros(1, length, dtype=torch.long)
        labels = ids.clone()
        labels[:, 0] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": torch.ones_like(ids), f"{side}_labels": labels}
    return batch


def main(path):
    generator = torch.Generator().manual_seed(0)
    lengths = [pair[0] for pair in LENGTHS] + [pair[1] for pair in LENGTHS]
    pairs = len(LENGTHS)
    policy, reference = Table(lengths, generator, True), Table(lengths, generator, False)
    shifted, shifted_reference = Table(lengths, generator, False), Table(lengths, generator, False)
    cases = {}

    def record(name, options, loss):
        (gradient,) = torch.autograd.grad(loss, policy.logprobs)
        cases[name] = {"options": options, "loss": round(loss.item(), 10), "gradient": policy.rows(gradient)}

    for name, options in DPO.items():
        kind = "sigmoid" if name == "ld" else name
        theirs = trainer(DPOTrainer, loss_types=[kind], ref_model=reference, **options)
        record(name, options, theirs._compute_loss(policy, policy.inputs(), False))
    for name, options in CPO.items():
        theirs, loss = trainer(CPOTrainer, **options), 0.0
        for p in range(pairs):
            piece = part(policy, [p, p + pairs])
            loss = loss + theirs.get_batch_loss_metrics(piece, pair_batch(piece))[0] / pairs
        record(name, options, loss)
    theirs, loss = trainer(ORPOTrainer, beta=0.4), 0.0
    for p in range(pairs):
        piece = part(policy, [p, p + pairs])
        loss = loss + theirs.get_batch_loss_metrics(piece, pair_batch(piece))[0] / pairs
    record("orpo", {"beta": 0.4}, loss)
    mismatched = (shifted.logprobs * shifted.mask).sum(1)
    difference = mismatched - (shifted_reference.logprobs * shifted_reference.mask).sum(1)
    for name, options in KTO.items():
        sums = {id(policy): difference, id(reference): torch.zeros(len(lengths))}
        instead = {"_compute_kl_logps": lambda model, batch, sums=sums: sums[id(model)]}
        theirs = trainer(KTOTrainer, ref_model=reference, beta=0.3, **options, **instead)
        inputs = policy.inputs() | {"label": torch.tensor([True] * pairs + [False] * pairs)}
        record(name, {"beta": 0.3, **options}, theirs._compute_loss(policy, inputs, False))
    content = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "policy": policy.rows(policy.logprobs),
        "reference": policy.rows(reference.logprobs),
        "mismatched_scores": [round(x, 10) for x in difference.tolist()],
        "cases": cases,
    }
    Path(path).write_text(json.dumps(content, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

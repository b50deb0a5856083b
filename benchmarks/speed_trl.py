"""Times TRL's GRPOTrainer on CPU, with given response lengths. Runs in a separate environment without rlkit.

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/speed.py --trl trl/bin/python

Called by benchmarks/speed.py. Uses fp32, no gradient checkpointing and transformers' own generation, which is what TRL
offers on CPUs. Prints one JSON line.
"""

import argparse
import json
import os
import tempfile
import time


def letters(completions, **_):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(map(str.islower, text)) / max(1, len(text)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=json.loads, help="what benchmarks/speed.py writes")
    work = parser.parse_args().work
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    eos, steps = 1, []
    lengths = iter(work["lengths"])

    class Replayed(LogitsProcessor):
        """Ends a response where the recorded one ended; one that reached the limit gets no end."""

        def __init__(self, ends: list[int]) -> None:
            self.ends, self.generated = torch.tensor(ends), 0

        def __call__(self, _, scores):
            self.generated += 1
            scores[:, eos] = -torch.inf
            ending = (self.ends == self.generated) & (self.ends < work["new_tokens"])
            scores[ending] = -torch.inf
            scores[ending, eos] = 0.0
            return scores

    class Timed(GRPOTrainer):
        generating = 0.0

        def _generate(self, *arguments, **options):
            began = time.perf_counter()
            try:
                return super()._generate(*arguments, **options)
            finally:
                self.generating += time.perf_counter() - began

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append((time.perf_counter(), time.process_time(), trainer.generating))

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in work["questions"]]
    with tempfile.TemporaryDirectory() as out:
        trainer = Timed(
            model=work["model"],
            reward_funcs=letters,
            args=GRPOConfig(
                output_dir=out,
                max_completion_length=work["new_tokens"],
                num_generations=work["samples"],
                per_device_train_batch_size=work["prompts"] * work["samples"],
                beta=0.0,
                learning_rate=1e-8,
                max_steps=work["steps"],
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(work["model"], padding_side="left"),
            callbacks=[Clock()],
        )
        generate = trainer.model.generate

        def replayed(*arguments, **options):
            return generate(*arguments, logits_processor=LogitsProcessorList([Replayed(next(lengths))]), **options)

        trainer.model.generate = replayed
        trainer.train()
    logged = [entry["completions/mean_length"] for entry in trainer.state.log_history if "reward" in entry]
    tokens = [round(mean * work["prompts"] * work["samples"]) for mean in logged]
    marks = [dict(zip(("wall", "cpu", "generate"), step, strict=True)) for step in steps]
    print(json.dumps({"marks": marks, "tokens": tokens, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()

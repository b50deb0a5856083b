"""`python -m rlkit.polar_training.sample_policy ORDER.json`: one policy's answers, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlkit.cluster.processes import die_with_parent
from rlkit.config.schema import RolloutConfig
from rlkit.data.rendering import load_tokenizer
from rlkit.models.folder import model_folder
from rlkit.polar_training.generate import SamplingOrder


def main() -> int:
    """Write a line per finished response to the order's output."""
    die_with_parent()
    order = SamplingOrder(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sample(order)
    return 0


def sample(order: SamplingOrder) -> None:
    """Answer all prompts; those that the model has no room for are left out, and named."""
    from rlkit.rollout.sampler import Request, Sampler, stop_token_ids

    folder = model_folder(order.folder)
    tokenizer = load_tokenizer(folder)
    if order.prompts_as == "chat":
        chats = [[{"role": "user", "content": prompt}] for prompt in order.prompts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        prompts = tokenizer(order.prompts)
    ids = prompts["input_ids"]
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    longest = max(map(len, ids))
    if positions is not None:
        longest = min(longest, positions - 1)
    room = order.max_new_tokens if positions is None else min(order.max_new_tokens, positions - longest)
    sampler = Sampler(
        str(folder),
        RolloutConfig(
            temperature=order.temperature,
            top_p=order.top_p,
            top_k=order.top_k,
            max_prompt_tokens=longest,
            max_response_tokens=room,
            memory_gib=order.memory_gib,
            gpu_memory_utilization=order.gpu_memory_utilization,
        ),
        device=order.device,
        seed=order.seed,
        stop_token_ids=stop_token_ids(str(folder), tokenizer),
    )
    for place, prompt in enumerate(ids):
        if len(prompt) > longest:
            print(f"prompt {place} has {len(prompt)} tokens, the model takes {longest}: left out")
            continue
        for turn in range(order.samples):
            seed = (order.seed + place * order.samples + turn) % 2**31
            sampler.add(Request(f"{place}/{turn}", prompt, seed, room, order.temperature))
    with Path(order.output).open("a", encoding="utf-8") as output:
        while sampler.busy:
            for response in sampler.step():
                text = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
                place, turn = map(int, response.id.split("/"))
                row = {"place": place, "turn": turn, "finished": response.finish_reason == "stop", "text": text}
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()


if __name__ == "__main__":
    sys.exit(main())

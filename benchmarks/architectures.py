"""Checks which architectures train correctly: rlkit/models/selftest.py on tiny random models of transformers.

python benchmarks/architectures.py            prints the table
python benchmarks/architectures.py --write    writes docs/models.md's table and rlkit/models/architectures.json
python benchmarks/architectures.py qwen2 ...  only some model types
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DATA = ROOT / "rlkit" / "models" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "attention_window_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_dt_rank": 4,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values that are set if a configuration has the field and it is not None."""


@dataclass(frozen=True)
class Row:
    model_type: str
    note: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def _row(model_type: str, note: str = "", **fields: Any) -> Row:
    return Row(model_type, note, fields)


_LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
_CONV = ["conv", "conv", "full_attention", "conv"] * 2
_MAMBA2 = {"num_heads": 4, "head_dim": 32, "n_groups": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ROWS = (
    _row("llama"),
    _row("llama", "tied head", tie_word_embeddings=True),
    _row("llama", "biases", attention_bias=True, mlp_bias=True),
    _row("llama", "RoPE: Llama 3", rope_parameters=_LLAMA3),
    _row("llama", "RoPE: YaRN", rope_parameters=_YARN),
    _row("llama", "RoPE: linear", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    _row("qwen2"),
    _row("qwen2", "tied head", tie_word_embeddings=True),
    _row("qwen2", "sliding window", use_sliding_window=True, sliding_window=8, max_window_layers=4),
    _row("qwen2_moe"),
    _row("qwen3"),
    _row("qwen3", "tied head", tie_word_embeddings=True),
    _row("qwen3_moe"),
    _row("qwen3_next", layer_types=_LINEAR),
    _row("qwen3_5_text", layer_types=_LINEAR),
    _row("qwen3_5_moe_text", layer_types=_LINEAR),
    _row("qwen3_5", text_config={"layer_types": _LINEAR}),
    _row("gemma"),
    _row("gemma2"),
    _row("gemma3_text"),
    _row("gemma3_text", "final soft cap", final_logit_softcapping=30.0),
    _row("gemma3"),
    _row("gemma3n_text"),
    _row("gemma4_text"),
    _row("gemma4"),
    _row("vaultgemma"),
    _row("mistral"),
    _row("ministral"),
    _row("ministral3"),
    _row("mixtral"),
    _row("phi"),
    _row("phi3"),
    _row("phimoe"),
    _row("olmo"),
    _row("olmo2"),
    _row("olmo3"),
    _row("olmoe"),
    _row("flex_olmo"),
    _row("olmo_hybrid", layer_types=_LINEAR),
    _row("glm"),
    _row("glm4"),
    _row("glm4_moe"),
    _row("glm4_moe_lite"),
    _row("glm_moe_dsa"),
    _row("granite", logits_scaling=8.0, attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=3.0),
    _row("granitemoe", logits_scaling=8.0),
    _row("granitemoeshared", logits_scaling=8.0),
    _row("granitemoehybrid", layer_types=["mamba", "mamba", "attention", "mamba"] * 2),
    _row("smollm3"),
    _row("lfm2", layer_types=_CONV),
    _row("lfm2_moe", layer_types=_CONV, num_dense_layers=2),
    _row("deepseek_v2", num_experts_per_tok=2, n_routed_experts=8, n_shared_experts=1),
    _row("deepseek_v3"),
    _row("deepseek_v32"),
    _row("gpt_oss"),
    _row("cohere"),
    _row("cohere2"),
    _row("exaone4"),
    _row("exaone_moe"),
    _row("ernie4_5"),
    _row("ernie4_5_moe"),
    _row("seed_oss"),
    _row("hunyuan_v1_dense"),
    _row("hunyuan_v1_moe"),
    _row("hyperclovax", logits_scaling=0.5),
    _row("apertus"),
    _row("arcee"),
    _row("afmoe"),
    _row("bitnet"),
    _row("cwm"),
    _row("dots1", n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=1),
    _row("helium"),
    _row("jais2"),
    _row("nanochat"),
    _row("nemotron", head_dim=16, num_key_value_heads=2),
    _row("solar_open"),
    _row("starcoder2"),
    _row("stablelm"),
    _row("diffllama"),
    _row("doge"),
    _row("minimax_m2"),
    _row("minicpm3"),
    _row("mimo_v2_flash"),
    _row("longcat_flash"),
    _row("llama4_text"),
    _row("laguna"),
    _row("hy_v3"),
    _row("youtu"),
    _row("persimmon"),
    _row("gpt2"),
    _row("gpt_bigcode"),
    _row("gpt_neo", attention_types=[[["global", "local"], 4]], window_size=8),
    _row("gpt_neox"),
    _row("gptj", rotary_dim=8),
    _row("codegen", rotary_dim=8),
    _row("opt", word_embed_proj_dim=64, ffn_dim=96),
    _row("falcon"),
    _row("mpt"),
    _row("bloom"),
    _row("xglm"),
    _row("biogpt"),
    _row("bamba"),
    _row("falcon_h1", lm_head_multiplier=0.5),
    _row("nemotron_h", layers_block_type=["mamba", "moe", "attention", "moe"]),
    _row("jamba"),
    _row("kimi_linear"),
    _row("minimax"),
    _row("mamba"),
    _row("mamba2", **_MAMBA2),
    _row("falcon_mamba"),
    _row("recurrent_gemma"),
    _row("rwkv"),
    _row("xlstm"),
    _row("zamba"),
    _row("roberta", is_decoder=True),
    _row("bert", is_decoder=True),
    _row("modernbert-decoder"),
)


def tiny_config(row: Row) -> Any:
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[row.model_type], row.fields)


def _tiny(cls: Any, fields: dict[str, Any]) -> Any:
    default = cls()
    chosen = {
        name: value
        for name, value in TINY.items()
        if _get(default, name) is not None and not isinstance(getattr(cls, name, None), property)
    }
    if (hasattr(cls, "head_dim") or "head_dim" in chosen) and not isinstance(getattr(cls, "head_dim", None), property):
        chosen["head_dim"] = chosen.get("qk_rope_head_dim", 16)
    if "qk_rope_head_dim" in chosen:  # MLA: as many key heads as query heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    fields = dict(fields)
    for name in getattr(cls, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            chosen[name] = _tiny(type(getattr(default, name)), fields.pop(name, {})).to_dict()
    return cls(**{**chosen, **fields})


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except AttributeError:
        return None
    except Exception:  # a field whose size differs between layers
        return True


@dataclass(frozen=True)
class Result:
    row: Row
    attention: str
    """Empty if the architecture is refused."""
    why: str

    @property
    def verdict(self) -> str:
        if not self.attention:
            return f"refused: {self.why}"
        return "exact" if self.attention == "rlkit_packed" else f"exact, row by row ({self.attention})"


def judge(row: Row) -> Result:
    from rlkit.models.selftest import try_attentions

    try:
        trials = try_attentions(tiny_config(row))
    except Exception as error:
        return Result(row, "", str(error).partition(" is refused: ")[2] or f"{type(error).__name__}: {error}")
    last = trials[-1]
    if not last.exact:
        return Result(row, "", "; ".join(map(str, trials)))
    return Result(row, last.attention, str(trials[0]) if len(trials) > 1 else "")


def served(model_type: str) -> bool:
    """Whether the installed vLLM has a class for the architecture that transformers names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.registry import ModelRegistry

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] in ModelRegistry.get_supported_archs()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("types", nargs="*")
    options.add_argument("--write", action="store_true")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = []
    for row in ROWS:
        if chosen.types and row.model_type not in chosen.types:
            continue
        began = time.monotonic()
        results.append(judge(row))
        print(
            f"{row.model_type:18} {row.note:16} {time.monotonic() - began:5.1f} s  {results[-1].verdict[:300]}",
            flush=True,
        )
    if chosen.write:
        write(results)


def write(results: list[Result]) -> None:
    by_type: dict[str, dict[str, Any]] = {}
    for result in results:
        known = by_type.setdefault(result.row.model_type, {"run": "packed", "vllm": served(result.row.model_type)})
        if not result.attention:
            known |= {"run": "refused", "why": result.why}
        elif result.attention != "rlkit_packed" and known["run"] == "packed":
            known["run"] = "rows"
    DATA.write_text(json.dumps(dict(sorted(by_type.items())), indent=1) + "\n", encoding="utf-8")
    lines = ["| model type | variant | training | served by vLLM |", "|---|---|---|---|"]
    for result in results:
        row = result.row
        lines.append(
            f"| `{row.model_type}` | {row.note} | {result.verdict.replace('|', '/')} | "
            f"{'yes' if by_type[row.model_type]['vllm'] else 'no'} |"
        )
    start, end = "<!-- table: benchmarks/architectures.py --write -->", "<!-- end of table -->"
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(start)[0], page.partition(end)[2]
    PAGE.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Which architectures train right: the self-test of rlkit/models/selftest.py on tiny random models of transformers.

python benchmarks/architectures.py            prints the table
python benchmarks/architectures.py --write    writes docs/models.md's table and rlkit/models/architectures.json
python benchmarks/architectures.py qwen2 ...  some model types only
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
"""Set where a configuration has the field, and it is not None."""


@dataclass(frozen=True)
class Row:
    model_type: str
    note: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def _row(model_type: str, note: str = "", **fields: Any) -> Row:
    return Row(model_type, note, fields)


ROWS = (
    _row("llama"),
    _row("llama", "tied head", tie_word_embeddings=True),
    _row("llama", "biases", attention_bias=True, mlp_bias=True),
)


def tiny_config(row: Row) -> Any:
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[row.model_type], row.fields)


def _tiny(cls: Any, fields: dict[str, Any]) -> Any:
    default = cls()
    chosen = {
        name: value
        for name, value in TINY.items()
        if getattr(default, name, None) is not None and not isinstance(getattr(cls, name, None), property)
    }
    if hasattr(default, "head_dim") and not isinstance(getattr(cls, "head_dim", None), property):
        chosen["head_dim"] = chosen.get("qk_rope_head_dim", 16)
    for name in getattr(cls, "sub_configs", {}).items():
        if getattr(default, name, None) is not None:
            chosen[name] = _tiny(type(getattr(default, name)), fields.get(name, {})).to_dict()
    return cls(**{**chosen, **fields})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as N

    from rlkit.models.selftest import try_attentions

    transformers.logging.set_verbosity_error()
    skip = [
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "blt",
        "camembert",
        "ctrl",
        "cpmant",
        "data2vec-text",
        "electra",
        "emu3",
        "ernie",
        "fuyu",
        "git",
        "got_ocr2",
        "marian",
        "mbart",
        "megatron-bert",
        "mllama",
        "moshi",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "openai-gpt",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "gpt-sw3",
        "phi4_multimodal",
    ]
    for t in sys.argv[1:] or [t for t in N if t not in skip]:
        s = time.time()
        try:
            c = tiny_config(Row(t))
            print(t, f"{time.time() - s:.1f}s", " | ".join(map(str, try_attentions(c))), flush=True)
        except Exception as e:
            print(t, f"{time.time() - s:.1f}s", "ERR", type(e).__name__, str(e)[-300:].replace("\n", " "), flush=True)

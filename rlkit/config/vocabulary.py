"""What other frameworks call a thing, and what rlkit does not have: answers by name instead of a near-by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# By last component of the key; of several keys the first that the chosen parts have.
OTHER_NAMES: Mapping[str, str] = {
    # sizes
    "batch_size": "trainer.prompts_per_step",
    "rollout_batch_size": "trainer.prompts_per_step",
    "train_batch_size": "trainer.prompts_per_step",
    "group_size": "algorithm.samples_per_prompt",
    "n": "algorithm.samples_per_prompt",
    "num_generations": "algorithm.samples_per_prompt",
    "rollout_n": "algorithm.samples_per_prompt",
    "num_minibatches": "learner.minibatches_per_step",
    "ppo_mini_batch_size": "learner.minibatches_per_step",
    "num_mini_batches": "learner.minibatches_per_step",
    "micro_batch_size": "learner.tokens_per_microbatch",
    "micro_train_batch_size": "learner.tokens_per_microbatch",
    "ppo_max_token_len_per_gpu": "learner.tokens_per_microbatch",
    "ppo_micro_batch_size": "learner.tokens_per_microbatch",
    "ppo_micro_batch_size_per_gpu": "learner.tokens_per_microbatch",
    "generate_max_len": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_tokens": "rollout.max_response_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "prompt_max_len": "rollout.max_prompt_tokens",
    "max_num_seqs": "rollout.max_concurrent_samples",
    "clear_kv_cache_on_weight_sync": "rollout.cache_after_update",
    "recompute_kv_cache_after_weight_updates": "rollout.cache_after_update",
    "gen_batch_size": "rollout.oversample",
    "over_sampling_batch_size": "rollout.oversample",
    "stop_strings": "rollout.stop",
    "stop_token_ids": "rollout.stop",
    "stop_tokens": "rollout.stop",
    "guided_regex": "rollout.structured.regex",
    "guided_choice": "rollout.structured.choices",
    "guided_json": "rollout.structured.json_schema",
    # algorithm
    "beta": "algorithm.beta algorithm.kl_coefficient",
    "init_kl_coef": "algorithm.kl_coefficient",
    "kl_beta": "algorithm.kl_coefficient",
    "kl_coef": "algorithm.kl_coefficient",
    "kl_coeff": "algorithm.kl_coefficient",
    "kl_loss_coef": "algorithm.kl_coefficient",
    "kl_loss_type": "algorithm.kl_estimator",
    "kl_penalty": "algorithm.kl_estimator",
    "ent_coef": "algorithm.entropy_coefficient",
    "entropy_coef": "algorithm.entropy_coefficient",
    "entropy_coeff": "algorithm.entropy_coefficient",
    "clip_ratio_low": "algorithm.clip_low",
    "cliprange_low": "algorithm.clip_low",
    "clip_ratio_high": "algorithm.clip_high",
    "cliprange_high": "algorithm.clip_high",
    "eps_clip_high": "algorithm.clip_high",
    "epsilon_high": "algorithm.clip_high",
    "clip_ratio_c": "algorithm.dual_clip",
    "cliprange_value": "algorithm.value_clip",
    "vf_clip": "algorithm.value_clip",
    "gae_lam": "algorithm.gae_lambda",
    "lam": "algorithm.gae_lambda",
    "lambd": "algorithm.gae_lambda",
    "lmbda": "algorithm.gae_lambda",
    "loss_agg_mode": "algorithm.aggregation",
    "loss_type": "algorithm.link algorithm.aggregation",
    "norm_adv_by_std_in_grpo": "algorithm.normalize_by_std",
    "scale_rewards": "algorithm.normalize_by_std",
    # preferences, fine-tuning, distillation
    "pref_beta": "algorithm.beta",
    "pref_loss": "algorithm.link",
    "label_smoothing_factor": "algorithm.label_smoothing",
    "simpo_gamma": "algorithm.target_margin",
    "cpo_alpha": "algorithm.nll_coefficient",
    "nll_loss_coef": "algorithm.nll_coefficient",
    "pref_ftx": "algorithm.nll_coefficient",
    "rpo_alpha": "algorithm.nll_coefficient",
    "use_weighting": "algorithm.on_policy_weights",
    "reference_free": "algorithm.reference",
    "sync_ref_model": "algorithm.reference_every_steps",
    "ref_model_sync_steps": "algorithm.reference_every_steps",
    "ref_model_mixup_alpha": "algorithm.reference_mix",
    "teacher_model": "algorithm.teacher",
    "teacher_model_name_or_path": "algorithm.teacher",
    "teacher_path": "algorithm.teacher",
    # learner and critic
    "lr": "learner.learning_rate",
    "actor_learning_rate": "learner.learning_rate",
    "actor_lr": "learner.learning_rate",
    "critic_learning_rate": "critic.learning_rate",
    "critic_lr": "critic.learning_rate",
    "lr_scheduler": "learner.schedule",
    "lr_scheduler_type": "learner.schedule",
    "lr_warmup_steps": "learner.warmup_steps",
    "num_warmup_steps": "learner.warmup_steps",
    "warmup_ratio": "learner.warmup_steps",
    "clip_grad": "learner.max_grad_norm",
    "grad_clip": "learner.max_grad_norm",
    "gradient_clipping": "learner.max_grad_norm",
    "max_norm": "learner.max_grad_norm",
    "adam_betas": "learner.betas",
    "adam_beta1": "learner.betas",
    "adam_beta2": "learner.betas",
    "world_size": "learner.ranks",
    "optimizer_offload": "learner.offload",
    "param_offload": "learner.offload",
    "enable_gradient_checkpointing": "learner.gradient_checkpointing",
    "activation_checkpointing": "learner.gradient_checkpointing",
    "ulysses_sequence_parallel_size": "learner.sequence_parallel",
    "sequence_parallel_size": "learner.sequence_parallel",
    "context_parallel_size": "learner.sequence_parallel",
    "sp_size": "learner.sequence_parallel",
    "activation_offload": "learner.offload_activations",
    "enable_activation_offload": "learner.offload_activations",
    "activation_offloading": "learner.offload_activations",
    "cpu_checkpointing": "learner.offload_activations",
    "torch_dtype": "learner.dtype",
    "bf16": "learner.dtype",
    # sampler
    "tp": "rollout.tensor_parallel_size",
    "tp_size": "rollout.tensor_parallel_size",
    "vllm_num_engines": "rollout.workers",
    "num_engines": "rollout.workers",
    "enable_prefix_caching": "rollout.prefix_caching",
    # run
    "max_steps": "trainer.total_steps",
    "num_steps": "trainer.total_steps",
    "total_training_steps": "trainer.total_steps",
    "save_freq": "trainer.save_every_steps",
    "save_interval": "trainer.save_every_steps",
    "save_steps": "trainer.save_every_steps",
    "num_train_epochs": "trainer.total_epochs",
    "num_epochs": "trainer.total_epochs",
    "max_epochs": "trainer.total_epochs",
    "generate_during_eval": "evaluation.generate",
    "chat_template_path": "model.chat_template",
    "eval_steps": "trainer.evaluate_every_steps",
    "test_freq": "trainer.evaluate_every_steps",
    "max_ckpt_num": "trainer.keep_checkpoints",
    "save_total_limit": "trainer.keep_checkpoints",
    "metric_for_best_model": "trainer.best_metric",
    "load_checkpoint": "resume",
    "resume_from_checkpoint": "resume",
    "resume_mode": "resume",
    "resume_from_path": "resume",
    "ckpt_path": "run_dir",
    "default_local_dir": "run_dir",
    "experiment_name": "run_dir",
    "output_dir": "run_dir",
    "save_path": "run_dir",
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "pretrain": "model.path",
    # data
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "prompt_data": "data.path",
    "train_files": "data.path",
    "test_files": "data.heldout_path",
    "val_files": "data.heldout_path",
    "eval_dataset": "data.heldout_path",
    "input_key": "data.prompt_column",
    "prompt_key": "data.prompt_column",
    "answer_key": "data.answer_column",
    "label_key": "data.answer_column",
    "chosen_key": "data.chosen_column",
    "rejected_key": "data.rejected_column",
    "response_key": "data.response_column",
    "messages_key": "data.messages_column",
    # reward
    "custom_reward_function": "reward.function",
    "reward_fn": "reward.function",
    "reward_func": "reward.function",
    "reward_funcs": "reward.function",
    "reward_function": "reward.function",
    "remote_rm_url": "reward.url",
}

LINKS: Mapping[str, str] = {
    "sigmoid": "algorithm=dpo",
    "sigmoid_norm": "algorithm=dpo_normalised",
    "hinge": "algorithm=hinge",
    "slic": "algorithm=hinge",
    "ipo": "algorithm=ipo",
    "exo_pair": "algorithm=exo",
    "nca_pair": "algorithm=nca",
    "robust": "algorithm=robust_dpo",
    "bco": "algorithm=bco",
    "bco_pair": "algorithm=bco",
    "kto": "algorithm=kto",
    "kto_pair": "algorithm=kto",
    "sppo_hard": "algorithm=sppo",
    "apo_zero": "algorithm=apo",
    "apo_down": "algorithm=dpo algorithm.link=apo_down",
    "simpo": "algorithm=simpo",
    "orpo": "algorithm=orpo",
    "sft": "algorithm=sft (beside a link: algorithm.nll_coefficient)",
    "nll": "algorithm=sft",
}
"""What other frameworks name by a key (`loss_type`), by its value."""
NAMES_A_LINK = ("loss_type", "pref_loss")

TRACKERS = "is not supported: metrics go to RUN/metrics.jsonl and to TensorBoard (tracking.tensorboard)"
EVALUATION = (
    "here it is evaluation.samples (for avg@k and pass@k), evaluation.greedy, evaluation.temperature and "
    "trainer.evaluation_prompts"
)
MULTI_TURN = (
    "several turns and tools are an environment's: environment=NAME (--help environment), or a class of yours, "
    "environment._target_=my_module.MyEnvironment"
)

LORA = "model.lora.rank=16 trains a low-rank adapter in place of all weights (docs/lora.md)"

# What a word of a key, an option or a command asks for -> the answer. The first that matches counts.
WISHES: tuple[tuple[str, str], ...] = (
    (r"(lora_)?dropout", "dropout is never active: sampler and learner would be two policies"),
    (r"qlora\w*", f"the base is not quantised (docs/lora.md says why); {LORA}"),
    (r"use_lora|lora_\w+|(use_)?peft\w*|adapters?|\w+_adapter_name", LORA),
    (r"(use_)?wandb\w*|weights_and_biases", f"W&B {TRACKERS}"),
    (r"mlflow|swanlab|neptune|comet(_ml)?|clearml|aim|trackio", f"this tracker {TRACKERS}"),
    (r"loggers?|report_to|project_name|tracker", f"another tracker {TRACKERS}"),
    (r"online_dpo|iterative_dpo", "that is algorithm=dpo on problems: the policy samples, the reward makes the pairs"),
    (r"multi_?turns?|max_turns|tools?|tool_\w+|env|environments?|agents?|agent_\w+|gym", MULTI_TURN),
    (r"gkd|minillm|on_policy_distillation", "that is algorithm=distill algorithm.teacher=FOLDER"),
    (
        r"teacher\w*|seq_kd",
        "algorithm=distill algorithm.teacher=FOLDER learns from a teacher's log-probs; algorithm=sft "
        "rollout.source=model rollout.source_path=FOLDER imitates its samples",
    ),
    (
        r"max_(target_|seq_|sequence_)?(length|len)|cutoff_len",
        "here it is rollout.max_prompt_tokens and rollout.max_response_tokens; longer rows are left out, not cut",
    ),
    (r"truncation_mode", "not needed: rows that are too long are left out and counted (rollout.max_response_tokens)"),
    (
        r"per_device_train_batch_size|(gradient_)?accumulation_steps|grad_accum\w*",
        "an optimizer step takes trainer.prompts_per_step pairs, prompts or conversations; "
        "learner.tokens_per_microbatch alone says what fits at a time",
    ),
    (r"(eval_)?packing\w*|padding_free|pad_\w+", "always so: sequences are packed without padding, each apart"),
    (
        r"(assistant|completion)_only_loss|train_on_(inputs?|prompt|responses_only)|mask_prompt",
        "always so: prompts have no loss; data.train_on (data=chat) says which of the assistant's messages have one",
    ),
    (
        r"precompute_ref\w*",
        "always so for recorded responses: the reference's log-probs are computed once; learner.reference_cache "
        "names a file that runs may share",
    ),
    (
        r"f_(alpha_)?divergence\w*|discopop_tau|loss_weights",
        "not supported: one link of log-ratios (algorithm.link, --help dpo), with algorithm.nll_coefficient beside it",
    ),
    (r"disable_dropout", "always so: no layer drops anything while it learns"),
    (r"shuffle\w*|train_sampling_strategy", "always so: every epoch has its own order, by seed"),
    (r"dataset_text_field", "data=chat takes messages (data.messages_column), or a prompt and a response"),
    (r"load_best_model_at_end", "the best checkpoint is kept: trainer.best_metric"),
    (
        r"eos_token(_ids?)?|ignore_eos",
        "a response ends with the model's own end tokens, a text or token of rollout.stop, or after "
        "rollout.max_response_tokens",
    ),
    (
        r"enable_thinking|thinking|\w*template_(kwargs|args)",
        "variables of the chat template are model.chat_template_arguments.NAME=VALUE",
    ),
    (
        r"ppo_epochs|update_epochs|num_ppo_epochs|num_iterations|mu",
        "passes over a step's samples are learner.epochs_per_step; learner.minibatches_per_step splits each of them",
    ),
    (
        r"\w*epochs?",
        "passes over the data are trainer.total_epochs, in place of trainer.total_steps",
    ),
    (r"(adam_|optimizer_)eps(ilon)?|eps", "not supported: AdamW's eps is 1e-8"),
    (
        r"optim|optimizer(_name|_type|_class)?",
        "the optimizer is AdamW: learner.learning_rate, learner.betas, learner.weight_decay",
    ),
    (
        r"eps_clip|clip_?range|clip_ratio|clip_eps|epsilon|ratio_clip",
        "here it is algorithm.clip_low and algorithm.clip_high",
    ),
    (r"pass_?(at|@)?_?k|(eval|val|evaluation|test)_(samples|temperature|n|k|top_p|top_k|kwargs|do_sample)", EVALUATION),
    (r"greedy|do_sample|best_of", EVALUATION),
    (r"adv_estimator|advantage_estimator", "here the algorithm says it: algorithm=NAME"),
    (r"use_kl_(loss|in_reward)", "here it is algorithm.kl_coefficient above 0, with algorithm.kl_in=loss or reward"),
    (
        r"ref|ref_model|reference_model|ref_path|ref_policy",
        "the reference policy is the starting one, loaded if algorithm.kl_coefficient is above 0",
    ),
    (r"fsdp\w*|megatron\w*|deepspeed\w*|zero_?\d", "the learner is DeepSpeed: learner.zero_stage, learner.ranks"),
    (
        r"nnodes|num_nodes|n_gpus\w*|num_gpus\w*|gpus",
        "here it is rollout.workers and learner.ranks (cluster=NAME presets them)",
    ),
    (
        r"load_in_\d+bit|quantization\w*|fp8|bnb\w*|awq|gptq",
        "the learner's weights are not quantised (learner.dtype); the sampler's are by rollout.engine.quantization",
    ),
    (
        r"\w*speculative\w*|spec_decod\w*|draft_model\w*",
        "drafts are rollout.engine.speculative_config, a mapping of vLLM's",
    ),
    (
        r"\w*kv_cache_dtype|\w*async_scheduling|(vllm|engine)_(kw)?arg\w*",
        "arguments of vLLM's engine are rollout.engine.NAME",
    ),
    (r"\w*(sequence|context)_parallel\w*|ulysses\w*|cp", "ranks that share sequences: learner.sequence_parallel"),
    (
        r"\w*(pipeline|expert)_parallel\w*|pp|ep",
        "not supported: sampling has rollout.tensor_parallel_size, training learner.ranks with learner.zero_stage and "
        "learner.sequence_parallel",
    ),
    (r"max_model_len\w*", "here it is rollout.max_prompt_tokens + rollout.max_response_tokens"),
    (r"attn_implementation|flash_attn\w*|flash_attention\w*", "not needed: the device decides it"),
    (r"logging_steps|log_freq|log_interval", "not needed: every step is logged"),
)

IN_SECTION: Mapping[str, tuple[tuple[str, str], ...]] = {
    "evaluation": (
        (r"reward|verifier|judge", "the judge is a part: verifier=NAME"),
        (r"every_steps|interval|freq", "here it is trainer.evaluate_every_steps"),
    ),
    "rollout": ((r"name|backend", "the sampler is vLLM; there is no other"),),
    "tracking": ((r"name|backends?|project|type", f"another tracker {TRACKERS}"),),
}
"""The same for names that mean something only as a key of, or an option for, this section."""

COMMANDS: tuple[tuple[str, str], ...] = (
    (
        r"eval|evaluate|evaluation|test|validate|benchmark",
        "evaluating alone is not supported yet; a run evaluates on held-out prompts before, during and after training "
        "(trainer.evaluate_every_steps)",
    ),
    (
        r"compare|show|samples|inspect|plot|dashboard|ui|logs?|triage",
        "did you mean view? rlkit view RUN [RUN ...] shows curves, samples, triage and comparisons in a browser",
    ),
    (
        r"chat|generate|infer|inference|sample|play|vllm",
        "not supported yet; transformers and vLLM load RUN/checkpoints/step_NNNNNN/policy, a Hugging Face folder",
    ),
    (
        r"export|merge|convert|save|push|upload",
        "not needed: RUN/checkpoints/step_NNNNNN/policy is a Hugging Face folder already",
    ),
    (r"resume|continue", "write it as rlkit train ... run_dir=RUN resume=auto"),
    (
        r"grpo|ppo|rloo|dapo|reinforce|prime|dpo|ipo|kto|orpo|simpo|cpo|distill|amft",
        "an algorithm is chosen by rlkit train algorithm=NAME",
    ),
    (r"reward|rm|train_rm|reward_model", "did you mean train-reward?"),
    (r"version", "write rlkit --version"),
    (r"help", "write rlkit --help"),
    (r"init|new|create|config|download|fetch", "not supported"),
)
"""What a command asks for -> the answer."""


def is_called(key: str, fields: Iterable[str]) -> bool:
    """Whether other frameworks call one of these full keys `key`."""
    return not set(OTHER_NAMES.get(key, "").split()).isdisjoint(fields)


def link_named(key: str, value: object) -> str | None:
    """`loss_type=ipo`: the recipe with that loss."""
    recipe = LINKS.get(str(value).strip("[]'\"").lower())
    return f"that is {recipe}" if recipe and key.rpartition(".")[2].lower() in NAMES_A_LINK else None


def answer(name: str, section: str = "") -> str | None:
    """What to say of a key, an option or a part of either that rlkit does not have; None for an unknown one."""
    own = next((IN_SECTION[top] for top in (section, name.partition(".")[0]) if top in IN_SECTION), ())
    steps = [step.strip("_") for step in name.lower().replace("-", "_").split(".")]
    for step in steps:
        for pattern, text in (*WISHES, *((*own, ("lora", LORA)) if step == steps[-1] else ())):
            if re.fullmatch(pattern, step):
                return text
    return None


def about_command(name: str) -> str | None:
    word = name.lower().replace("-", "_")
    return next((text for pattern, text in COMMANDS if re.fullmatch(pattern, word)), answer(word))

"""The typed configuration of a run: every key with its type, range and meaning.

`algorithm`, `reward`, `data`, `verifier` and `environment` are parts: the class that `_target_` names defines their
fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, StrictInt, StrictStr, field_validator

from rlkit.config.lora import LoraConfig
from rlkit.config.named import parse_diagnostics
from rlkit.config.structured import StructuredConfig
from rlkit.config.tracking import TrackingConfig
from rlkit.diagnostics.base import DiagnosticConfig
from rlkit.experience.filters import BufferConfig
from rlkit.experience.section import LearningRate, Section, Seed


class TrainerConfig(Section):
    """The training loop."""

    total_steps: int = Field(default=100, ge=1)
    """Training steps: each collects `prompts_per_step` groups, updates the policy and publishes its weights."""
    total_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data; replaces `total_steps`."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts (= groups) per step. Responses per step: this times `algorithm.samples_per_prompt`."""
    max_staleness: int = Field(default=0, ge=0)
    """How many policy versions old a group may be when it is trained on. 0: synchronous training."""
    evaluate_every_steps: int = Field(default=25, ge=0)
    """Steps between held-out evaluations. There is always one before and one after training; 0: only these two."""
    evaluation_prompts: int = Field(default=256, ge=1)
    """Held-out prompts per evaluation (all if there are fewer). The section `evaluation` sets how they are answered."""
    save_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints `checkpoints/step_NNNNNN/`, from which a run can resume. 0: by `save_every_minutes`.
    A checkpoint is also saved after the last step, when an evaluation improves `best_metric`, and, if no step is
    half-done, when SIGTERM, Ctrl-C, a failing reward or sampler, or a deadline ends the run."""
    save_every_minutes: float = Field(default=30.0, ge=0)
    """Save a checkpoint after the next complete step once the last one is this many minutes old. 0: never."""
    step_timeout_seconds: float = Field(default=1800.0, ge=1)
    """A step (collecting, updating, publishing), evaluation or checkpoint that takes longer ends the run. The message
    names the process that the run was waiting for."""
    startup_timeout_seconds: float = Field(default=600.0, ge=1)
    """Time limit for reading the data, and again for starting the actors."""
    report_waits_after: float = Field(default=0.25, gt=0, lt=1)
    """Report a wait on the screen when it has lasted this share of its time limit, and again each time its duration
    doubles."""
    mismatch_alarm: float = Field(default=0.05, gt=0)
    """Warn when the mean difference between the sampler's and the learner's log-probs exceeds this in a step."""
    max_mismatch: float | None = Field(default=0.2, gt=0)
    """Stop the run when this mean difference exceeds the value in three steps in a row (healthy: 1e-6 in fp32, 0.01 to
    0.03 in bfloat16); null: never."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints to keep: the newest ones, and the best."""
    best_metric: str | None = None
    """The best checkpoint has the largest value of this metric (of its step or of the latest evaluation); null: the
    metric that the evaluations report, `accuracy/heldout` or `reward/heldout`."""
    hacking_alarm_steps: int = Field(default=10, ge=0)
    """Steps per window of the diagnostic `hacking`. It warns when the mean reward (or a process reward model's
    accuracy) rises from one window to the next while the share of right answers falls. 0: never."""
    max_skipped_updates: int = Field(default=3, ge=1)
    """Stop the run after this many updates in a row were skipped because of a non-finite loss or gradient."""

    def steps_on(self, prompts: int) -> int:
        """Return the number of steps of a run with this many training prompts."""
        if self.total_epochs is None:
            return self.total_steps
        return max(1, round(self.total_epochs * prompts / self.prompts_per_step))


class ModelConfig(Section):
    """The trained policy."""

    path: str = "embedded:policy"
    """Folder of a Hugging Face causal LM with its tokenizer; `embedded:policy` is the tiny one in this package."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    chat_template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, like `enable_thinking`: model.chat_template_arguments.enable_thinking=false."""
    trust_remote_code: bool = False
    """Run Python code from the model folder. Only for folders you trust."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter: model.lora.rank=16 and other keys (docs/lora.md); null: all weights are trained."""


class RolloutConfig(Section):
    """Where responses come from, and the vLLM sampler."""

    source: Literal["policy", "data", "model"] = "policy"
    """policy: sampled from the trained policy; data: recorded in the data (data=pairs, responses, chat), so that no
    sampler starts; model: sampled from a frozen model (`source_path`)."""
    source_path: str | None = None
    """Folder of the model for source=model. It must have the policy's tokenizer."""
    judge: Literal["auto", "always"] = "auto"
    """Whether the reward scores the responses. auto: if the algorithm learns from scores and the data have none."""
    workers: int = Field(default=1, ge=0)
    """vLLM engines, one Ray actor each; 0 where nothing is sampled."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a worker's process that died, or did not confirm new weights, is replaced before the run stops."""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """Sampling temperature in training, and in evaluation unless `evaluation` sets another. The learner's log-probs
    use the same temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling. Below 1 the sampler's log-probs no longer equal the learner's, and the run warns."""
    top_k: int = Field(default=0, ge=0)
    """Keep only the k likeliest tokens; 0 keeps all. Same warning as for `top_p`."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Keep only tokens with at least this share of the likeliest token's probability; 0 keeps all. Same warning as for
    `top_p`."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """For tokens that already occur in the prompt or the response, divide positive logits by this and multiply negative
    ones by it; 1 does nothing. Same warning as for `top_p`."""
    stop: tuple[StrictInt | StrictStr, ...] = ()
    """Texts and token ids that end a response (finish reason `stop`), in addition to the model's own end tokens. The
    token that completes a stop text, or is a stop id, is the response's last: it is trained, and rewards read it."""
    structured: StructuredConfig | None = None
    """A pattern that every response must match; null: anything."""
    oversample: float = Field(default=1.0, ge=1, le=10)
    """Groups to sample per group that a step still lacks, so that a filter's rejections need no second round (which
    waits for its own longest response). Surplus groups, those requested last, are dropped and counted."""
    max_prompt_tokens: int = Field(default=512, ge=8)
    """Longer prompts are bad rows: reported, counted and skipped."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Sampling stops at this length (finish reason `length`)."""
    max_concurrent_samples: int = Field(default=256, ge=1, le=65536)
    """Sequences one engine decodes at a time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPU."""
    memory_gib: float = Field(default=1.0, gt=0)
    """CPU only: memory for the key-value cache."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """CUDA only: share of the GPU's memory that vLLM takes."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""
    enforce_eager: bool = False
    """Skip CUDA graphs and compilation: quicker start, slower decoding on GPUs. No effect on a CPU."""
    prefix_caching: bool = True
    """Prefill the prompt of a group once for all its samples."""
    steps: Literal["none", "auto", "lines", "numbered", "blank_line"] = "none"
    """Split responses into steps, for process rewards. lines: at line ends; numbered: at `Step 3:`; blank_line: at
    blank lines; auto: numbered if it occurs, else lines; none: as the reward says, else every token is a step."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine under vLLM's names (EngineArgs), such as `rollout.engine.kv_cache_dtype=fp8`.
    Arguments for which rlkit has an option are refused."""
    cache_after_update: Literal["recompute", "keep"] = "recompute"
    """max_staleness above 0: when new weights arrive, recompute the keys and values of running requests, so that each
    token's log-prob comes from one policy, or keep them: faster, but later tokens come from no single policy. Their
    log-probs are recorded as sampled."""
    sample_seeds: Literal["auto", "always", "never"] = "auto"
    """Give each sample its own seed, so that the result does not depend on the engine or the batch it is sampled in.
    auto: on CPU, and on GPUs where it costs nothing (vLLM's runner V2, its default there; the older runner samples
    request by request)."""
    canary_tolerance: float | None = Field(default=None, gt=0)
    """Largest log-prob difference on the canary prompts after a weight update; null: 1e-3 in fp32, 1 in eight bits,
    0.5 otherwise. Finer checks cover which parameters the engine wrote, whether their bits changed, and how the canary
    changed."""
    sleep: Literal["auto", "always", "never"] = "never"
    """CUDA: free the engines' GPU memory (weights and key-value cache) while the learner works. auto: if engines
    share GPUs with ranks and training is synchronous."""

    @property
    def reshaping(self) -> tuple[str, ...]:
        """Options that make the sampler draw from a distribution other than the policy's."""
        off = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        names = [name for name, value in off.items() if getattr(self, name) != value]
        return (*names, *([] if self.structured is None else [f"structured.{self.structured.kind}"]))

    @property
    def stop_texts(self) -> list[str]:
        return [stop for stop in self.stop if isinstance(stop, str)]

    @property
    def stop_ids(self) -> list[int]:
        return [stop for stop in self.stop if isinstance(stop, int)]

    @field_validator("stop", mode="before")
    @classmethod
    def _is_a_list(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str | int) and not isinstance(stop, bool) else stop

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if "" in stop:
            raise ValueError("has an empty text, which would end every response at once")
        return stop

    @field_validator("temperature", mode="before")
    @classmethod
    def _explores(cls, temperature: Any) -> Any:
        if not isinstance(temperature, bool) and temperature == 0:
            raise ValueError(
                "must be above 0: at 0 all responses to a prompt are the same, so none can be better than another "
                "(for a greedy evaluation, set evaluation.greedy=true)"
            )
        return temperature


class EvaluationConfig(Section):
    """How held-out problems are answered. The part `verifier=NAME`, any of the rewards, judges the answers."""

    samples: int = Field(default=1, ge=1)
    """Responses to each held-out prompt. The accuracy is their mean (avg@k); `evaluation/pass@k` is reported for k = 2,
    4, 8, ... up to this."""
    greedy: bool = False
    """Decode greedily: one response per prompt, without sampling."""
    temperature: float | None = Field(default=None, ge=0.01, le=2)
    """Sampling temperature; null: `rollout.temperature`."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Length at which a response is cut; null: `rollout.max_response_tokens`."""
    generate: bool = False
    """source=data: also sample responses to the held-out problems and let the verifier judge them. This starts the
    engines."""
    training_answers: bool = True
    """Let the verifier also judge the training responses of each step (`accuracy/train`). false saves the calls to a
    verifier that is slow or costs money."""
    sets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further held-out sets: `evaluation.sets.NAME.path=FILE` takes all rows of a file, with the columns of `data`;
    `evaluation.sets.NAME.data=OPTION` takes another source (any option of `data`, with its keys);
    `evaluation.sets.NAME.prompts=N` limits the prompts. Metrics: `evaluation/NAME/accuracy` and others."""

    @field_validator("temperature", mode="before")
    @classmethod
    def _samples(cls, temperature: Any) -> Any:
        if not isinstance(temperature, bool) and temperature == 0:
            raise ValueError("must be above 0; evaluation.greedy=true takes the likeliest tokens")
        return temperature


class LearnerConfig(Section):
    """The DeepSpeed policy learner."""

    learning_rate: LearningRate = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule after warm-up, down to `min_learning_rate_ratio` at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    minibatches_per_step: int = Field(default=1, ge=1)
    """Optimizer steps per training step and epoch; each takes an equal share of the step's groups."""
    epochs_per_step: int = Field(default=1, ge=1)
    """Passes over a step's groups (PPO's K epochs), reshuffled after the first. The old log-probs remain those computed
    before the step."""
    tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Tokens per forward and backward pass, over all ranks that share a sequence. A prompt that a group shares counts
    once. A quarter of attention's keys (the prompt's are copied for each response) counts instead if it is larger."""
    logit_elements_per_chunk: int = Field(default=2**25, ge=1)
    """Logits are computed in chunks of at most this many elements (rows x vocabulary)."""
    ranks: int = Field(default=1, ge=1)
    """Learner processes. Every `sequence_parallel` of them form one data-parallel replica."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that compute each sequence together (Ulysses), for long sequences: each has a share of its tokens, or of
    the heads in attention."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what is partitioned across ranks (1 optimizer, 2 + gradients, 3 + parameters)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 (with fp32 master weights) on CUDA, float32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_activations: bool = False
    """CUDA, with gradient_checkpointing: keep the layers' inputs in host memory until the backward pass."""
    reference_cache: str | None = None
    """source=data: file that caches the reference policy's log-probs, keyed by model and tokens; null: in the run
    folder. Runs may share a file."""
    offload: Literal["auto", "always", "never"] = "never"
    """CUDA, ZeRO 1 or more: keep optimizer states and parameters in host memory while the engines sample. auto: if
    engines share GPUs with ranks and training is synchronous."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per training step."""
        return self.minibatches_per_step * self.epochs_per_step

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas of the model, each with samples of its own."""
        return self.ranks // self.sequence_parallel


class CriticConfig(LearnerConfig):
    """The critic of algorithms that need one, with its own model, engine and optimizer."""

    path: str | None = None
    """Folder of the initial model; null: the policy's. A missing value head is initialised to zero."""
    learning_rate: LearningRate = 1e-5
    """Peak learning rate of AdamW."""
    policy_waits_steps: int = Field(default=0, ge=0)
    """Training steps at the start during which only the critic learns."""


class ClusterConfig(Section):
    """Where the actors run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device of rollout workers and learner ranks."""
    placement: Literal["colocated", "apart"] = "colocated"
    """CUDA: sampler, learner, critic and rewards share GPUs (colocated), or each has GPUs of its own (apart)."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: few nodes (PACK) or many (SPREAD) where possible; with STRICT_, the run does not start
    if that is impossible."""
    weight_transfer: Literal["auto", "object_store", "gloo", "nccl", "ipc"] = "auto"
    """How new weights reach the engines: through Ray's object store (one copy per node), or in buckets by gloo
    (CPU), NCCL (GPUs apart) or CUDA IPC (shared GPUs). auto: object store on CPU, else whatever the placement
    allows."""
    weight_bucket_mib: int = Field(default=512, ge=1)
    """gloo, NCCL, IPC: bucket size in MiB; a larger tensor gets its own bucket."""
    address: str | None = None
    """Ray address to join; null: start a Ray that ends with the run (inside a Ray job, join its cluster)."""
    threads_per_actor: int = Field(default=2, ge=1)
    """CPU threads of each rollout worker and learner rank."""
    object_store_gib: float | None = Field(default=None, gt=0)
    """Shared memory for a Ray started by the run; null: what the weights and the groups of a step need, but at least
    0.5."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU (an 80 GB one has 79), for the plan: a run that cannot fit is refused. null: query this
    machine's GPUs; without a GPU, the plan prints what is needed."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one machine, for the plan; null: that of this machine, if the run starts its own Ray here."""

    @field_validator("address")
    @classmethod
    def _is_no_dashboard(cls, address: str | None) -> str | None:
        if address is not None and address.startswith(("http://", "https://")):
            raise ValueError(
                "is a dashboard, which takes jobs: use python -m rlkit.submit with the same arguments. A run itself "
                "joins Ray with cluster.address=HOST:6379 (or auto)"
            )
        return address


class RunConfig(Section):
    """The whole configuration of `python -m rlkit.train`."""

    seed: Seed = 0
    """Seed of the data order, sampling and all other randomness."""
    run_dir: Path
    """Folder for the run's files; created if missing, refused if it already holds a run."""
    resume: str = "never"
    """auto: resume from the newest complete checkpoint in `run_dir`, or start a new run if there is none; a folder:
    resume from that checkpoint (or that run's newest); never: start a new run."""
    dry_run: bool = False
    """Validate the configuration, print the plan and exit."""
    trainer: TrainerConfig = TrainerConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    diagnostics: Annotated[tuple[SerializeAsAny[DiagnosticConfig], ...], BeforeValidator(parse_diagnostics)] = Field(
        default=("hacking",), validate_default=True
    )
    """Diagnostics that watch the steps: names (hacking, ratio_shift, reward_gap, drift, starc, judge_fpr), dotted paths
    of your classes, or mappings with a `kind` and its options. [] turns all off."""
    algorithm: dict[str, Any]
    """A swappable part: `_target_` and the fields of its `Config`."""
    reward: dict[str, Any]
    """A swappable part: `_target_` and the fields of its `Config`."""
    data: dict[str, Any]
    """A swappable part: `_target_` and the fields of its `Config`."""
    verifier: dict[str, Any]
    """A swappable part, any of the rewards: judges held-out answers, and training answers for `accuracy/train`."""
    environment: dict[str, Any] = Field(default={"_target_": None})
    """A swappable part, or none (`_target_: null`): what the policy interacts with over several turns."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _is_named(cls, run_dir: Any) -> Any:
        if run_dir == "":
            raise ValueError("is empty; name a folder (run_dir=runs/NAME), or leave it out for one named by the time")
        return run_dir

    @field_validator("resume", mode="before")
    @classmethod
    def _is_a_way_to_resume(cls, resume: Any) -> Any:
        ways = "auto (from the newest checkpoint of run_dir), the folder of a run or checkpoint, or never"
        word = str(resume).lower()
        if word in ("true", "yes", "on", "latest", "last", "newest", "1"):
            raise ValueError(f"did you mean resume=auto? It must be {ways}")
        if word in ("false", "no", "off", "none", "0", ""):
            raise ValueError(f"did you mean resume=never? It must be {ways}")
        return resume

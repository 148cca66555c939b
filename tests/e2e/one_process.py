"""Every task on sixteen digits, one after the other in one process, as in a notebook; also a script for a launcher.

`python -m torch.distributed.run ... tests/e2e/one_process.py FOLDER` runs it in several processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dit.main
import latent_cache.__main__
import ssdd.main
from ssdd.engine.files import read_json

IMAGES = ["dataset.source=digits", "dataset.im_size=16", "dataset.limit=16"]
TOKENIZER = [
    *IMAGES, "dataset.batch_size=8", "ssdd.encoder=f8c2", "ssdd.encoder_width=8", "ssdd.decoder=XXS",
    "training.compile=false", "ssdd.fm_sampler.steps=2", "losses.lpips=0", "losses.repa=0", "training.steps=3",
    "training.optimizer=adamw", "training.lr=1e-3", "training.eval_freq=0", "training.log_freq=1",
    "evaluation.features=[]",
]  # fmt: skip
GENERATOR = ["model.name=DiT-XXS/1", "training.steps=3", "training.batch_size=8", "training.log_freq=1"]
SAMPLES = ["sampling.n=8", "sampling.steps=2", "sampling.cfg_scale=1"]
DECODERS = "evaluation.decoders=[two:tokenizer:2,one:student:1]"


class Chain:
    """The tasks as a user calls them, below one folder; each returns what its result file says, in the main process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def tokenizer(self, *arguments: str, run: str = "tokenizer") -> dict:
        return self._ssdd(run, *TOKENIZER, "ssdd.encoder_train=true", *arguments)

    def student(self, *arguments: str) -> dict:
        return self._ssdd("student", *TOKENIZER, "ssdd.checkpoint=tokenizer", "distill_teacher=true", *arguments)

    def evaluation(self, *arguments: str) -> dict:
        return self._ssdd("evaluation", "task=eval", *IMAGES, DECODERS, "evaluation.features=[]", *arguments)

    def z_stats(self) -> dict:
        return self._ssdd("z_stats", "task=z_stats", *IMAGES, "ssdd.encoder_checkpoint=tokenizer")

    def cache(self) -> dict:
        out = self.folder / "cache"
        arguments = ["tokenizer=tokenizer", f"out={out}", *IMAGES, "samples_per_shard=8", "batch_size=8"]
        self._run(latent_cache.__main__.main, "build", *arguments)
        return self._told(out / "manifest.json").get("encoding", {})

    def generator(self, *arguments: str) -> dict:
        return self._dit("generator", f"cache={self.folder / 'cache'}", *GENERATOR, *arguments)

    def samples(self, *arguments: str) -> dict:
        out = self.folder / "samples"
        self._run(dit.main.main, "task=sample", "run_name=generator", f"out={out}", *SAMPLES, *arguments)
        return self._told(out / "sample_set.json")

    def generation(self, *arguments: str) -> dict:
        options = [f"samples={self.folder / 'samples'}", "evaluation.features=[]", DECODERS]
        self._run(dit.main.main, "task=evaluate", f"out={self.folder / 'generation'}", *IMAGES, *options, *arguments)
        return self._told(self.folder / "generation" / "task_result.json")

    def _ssdd(self, run: str, *arguments: str) -> dict:
        self._run(ssdd.main.main, f"run_name={run}", *arguments)
        return self._told(self.folder / "jobs" / run / "task_result.json")

    def _dit(self, run: str, *arguments: str) -> dict:
        self._run(dit.main.main, f"run_name={run}", *arguments)
        return self._told(self.folder / "jobs" / run / "task_result.json")

    def _told(self, path: Path) -> dict:
        return read_json(path) if os.environ.get("RANK", "0") == "0" else {}  # the others don't wait for it

    def _run(self, main, *arguments: str) -> None:
        assert main([*arguments, f"ckpt_dir={self.folder}"]) == 0


if __name__ == "__main__":
    chain = Chain(Path(sys.argv[1]))
    for step in (
        lambda: chain.tokenizer("training.mixed_precision=bf16"),
        chain.student,
        chain.evaluation,
        lambda: chain.tokenizer("training.mixed_precision=no", run="exact"),
        chain.cache,
        lambda: chain.generator("training.mixed_precision=bf16"),
        chain.samples,
        chain.generation,
    ):
        step()

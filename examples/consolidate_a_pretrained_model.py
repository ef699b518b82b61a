"""Let a pretrained model skip far attention, with a promise about its loss; then use it as before.

The model is the small one of the package glassllm, so that this runs in seconds; `cramlab consolidate` does the same
from the command line, for any causal model of Hugging Face.
"""

import tempfile
from pathlib import Path

import torch

import cramlab
from cramlab.auditing import read_corpus
from cramlab.consolidation.config import RetrofitConfig
from cramlab.consolidation.pipeline import consolidate
from cramlab.hf.loading import load

torch.set_num_threads(1)
few = {"fit": 12, "gate": 6, "sensitivity": 3, "validation": 4, "test": 4, "calibration": 30}
sizes = {f"{part}_documents": n for part, n in few.items()}
config = RetrofitConfig(context=128, window=16, max_rank=8, strengths=(0.1, 1.0), **sizes)
pretrained = load("glassllm")  # yours: a folder, a hub name, or cramlab.hf.loading.Pretrained(...)

with tempfile.TemporaryDirectory() as folder:
    record = consolidate(pretrained, read_corpus("stdlib"), config, max_loss_increase=0.1, out=Path(folder))
    model = cramlab.load(pretrained.model, folder)

tokens = torch.tensor([pretrained.encode("def main(argv=None): parser = argparse.ArgumentParser() " * 3)])[:, :100]
model.generate(tokens, max_new_tokens=8, do_sample=False)
print(cramlab.read_report(model))
test = record["test"]
print(f"test: {test['increase']:+.4f} nats per token, {test['skipped_frac']:.0%} of far reads skipped")

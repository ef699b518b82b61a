"""Let a pretrained model skip far attention within a certified increase of its loss; then use it as before.

The model is the small one of the package glassllm, so that this runs in seconds. `cramlab consolidate` does the same
from the command line, for any causal model of Hugging Face.
"""

import tempfile

import torch

import cramlab

torch.set_num_threads(1)
few = {"fit": 12, "gate": 6, "sensitivity": 3, "validation": 4, "test": 4, "calibration": 30}
sizes = {f"{part}_documents": n for part, n in few.items()}
pretrained = cramlab.load_pretrained("glassllm")  # yours: a folder, a name of the hub, or (model, tokenizer)

with tempfile.TemporaryDirectory() as folder:
    record = cramlab.consolidate(
        pretrained,
        "stdlib",  # yours: a folder of text files, a file, or a list of texts
        folder,
        max_loss_increase=0.1,
        context=128,
        window=16,
        max_rank=8,
        strengths=(0.1, 1.0),
        **sizes,
    )
    model = cramlab.load_consolidated(pretrained, folder)

tokens = torch.tensor([pretrained.encode("def main(argv=None): parser = argparse.ArgumentParser() " * 3)])[:, :100]
model.generate(tokens, max_new_tokens=8, do_sample=False)
print(cramlab.skip_counts(model))
test = record["test"]
print(f"test: {test['increase']:+.4f} nats per token, {test['skipped_frac']:.0%} of far reads skipped")

"""A Hugging Face model from its config, sparse, saved and loaded: `python examples/huggingface_bert.py`."""

import argparse
import tempfile

import torch
from transformers import BertConfig, BertModel

import shflnb
import shflnb.nn


def main() -> None:
    """Nothing is downloaded: the weights are random."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a tiny model")
    short = parser.parse_args().short
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128} if short else {"hidden_size": 768, "intermediate_size": 3072}
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = BertModel(BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)).to(device, dtype).eval()
    inputs = {"input_ids": torch.randint(0, 30000, (4, 16 if short else 128), device=device)}

    report = shflnb.sparsify_(
        model, 0.75, (16, 16) if short else (64, 64), example_inputs=inputs, ignore=["pooler"], policy="always"
    )
    report.print()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(**inputs).last_hidden_state
        model.save_pretrained(folder)
        shflnb.nn.register_with_transformers()  # in a new process: this line, then from_pretrained
        again = BertModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        print("equal after reload:", torch.equal(again(**inputs).last_hidden_state, before))


if __name__ == "__main__":
    main()

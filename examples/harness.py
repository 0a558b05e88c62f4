"""lm-evaluation-harness with HopeForCausalLM. Needs transformers, accelerate and lm_eval.

Takes what `lm_eval run` takes; of a folder that `save_pretrained` wrote, with a tokenizer in it:

    python examples/harness.py --model hf --model_args pretrained=hope --tasks recall --include_path examples/harness
"""

import sys

from lm_eval.__main__ import cli_evaluate

import nestopt.models.hf  # noqa: F401  # transformers then knows the model

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    cli_evaluate()

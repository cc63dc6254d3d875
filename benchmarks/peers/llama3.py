"""The Llama 3 tokenizer from a public package: `python benchmarks/peers/llama3.py DIR`.

Takes llama3/tokenizer.model from the `llama-models` wheel (pip, no dependencies), converts it by transformers'
`TikTokenConverter` and saves it with Llama 3's chat template. The template carries `{% generation %}` marks, by
which TRL and transformers tell what an assistant wrote.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3.1's names for the first control tokens; the rest of its 256 are reserved, in order.
NAMED = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first -%}{{- bos_token -}}{%- endif -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


def build(directory: Path) -> None:
    """Write tokenizer.json, its config and the template to `directory`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    reserved = [f"<|reserved_special_token_{number}|>" for number in range(3, 3 + 256 - len(NAMED))]
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = _fetch(Path(scratch))
        converter = TikTokenConverter(str(vocabulary), pattern=PATTERN, extra_special_tokens=[*NAMED, *reserved])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=converter.converted(),
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            pad_token="<|finetune_right_pad_id|>",
            clean_up_tokenization_spaces=False,
        )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "llama-models", "--dest", str(scratch)], check=True)
    [wheel] = scratch.glob("llama_models-*.whl")
    return Path(zipfile.ZipFile(wheel).extract("llama_models/llama3/tokenizer.model", scratch))


if __name__ == "__main__":
    build(Path(sys.argv[1]))

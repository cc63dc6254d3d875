"""The reference for ids and masks: transformers' `apply_chat_template` on every conversation, one at a time."""

from __future__ import annotations

import json

import measure
import numpy as np
from transformers import AutoTokenizer


def main() -> None:
    given = measure.arguments()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    documents = []
    with given.data.open(encoding="utf-8") as lines:
        for line in lines:
            found = tokenizer.apply_chat_template(
                json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            trained = np.asarray(found["assistant_masks"], dtype=np.bool_)
            documents.append((np.asarray(found["input_ids"], dtype=np.int32), trained))
    measure.save(given.documents, len(documents), documents)
    measure.finish(packages=["transformers", "tokenizers"], configuration={}, steps={})


if __name__ == "__main__":
    main()

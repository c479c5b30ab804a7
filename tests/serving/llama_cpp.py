"""Runs in the servers' environment, as a script: `python llama_cpp.py MODEL.gguf PROMPTS TOKENS OUT`; imports nothing of this
package. PROMPTS are ids, OUT the text after each, greedily."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp


def main(model: str, prompts: list[list[int]], new_tokens: int, out: Path) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 1, False, 1
    server = xllamacpp.Server(settings)
    greedy = {"n_predict": new_tokens, "max_tokens": new_tokens, "temperature": 0, "top_k": 1}
    texts = []
    for prompt in prompts:
        found = server.handle_completions({"prompt": prompt, **greedy})
        texts.append(found["choices"][0]["text"] if "choices" in found else found["content"])
    out.write_text(json.dumps(texts))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]), Path(sys.argv[4]))

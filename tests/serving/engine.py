"""Runs in vLLM's environment, as a script: `python engine.py WISHES OUT`, both JSON; imports nothing of this package.

WISHES lists engines, `{"model": folder, "adapters": {name: folder}, "prompts": [ids, ...], "new_tokens": n, "max_lora_rank": r}`.
OUT has for each `{who: answers}`, of the adapters by name and of "model" alone, each answer the new ids; or the text of an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(wishes: list[dict[str, Any]], out: Path) -> None:
    found: list[dict[str, Any]] = []
    for wish in wishes:
        engine, adapters = opened(wish), wish.get("adapters", {})
        greedy = SamplingParams(temperature=0, max_tokens=wish["new_tokens"])
        prompts = [{"prompt_token_ids": ids} for ids in wish["prompts"]]
        answers: dict[str, Any] = {}
        for number, name in enumerate([*adapters, "model"]):
            adapter = LoRARequest(name, number + 1, adapters[name]) if name in adapters else None
            try:  # by itself: a request whose adapter is refused would stay in the engine's queue for good
                if adapter is not None:
                    engine.llm_engine.add_lora(adapter)
            except Exception as error:  # what a refusal is, the test says
                answers[name] = f"{type(error).__name__}: {error}"
                continue
            made = engine.generate(prompts, greedy, lora_request=adapter, use_tqdm=False)
            answers[name] = [list(each.outputs[0].token_ids) for each in made]
        found.append(answers)
        engine.llm_engine.engine_core.shutdown()
        out.write_text(json.dumps(found))


def opened(wish: dict[str, Any]) -> LLM:
    loras = wish.get("adapters", {})
    room = {"enable_lora": True, "max_loras": 2, "max_lora_rank": wish["max_lora_rank"]} if loras else {}
    return LLM(wish["model"], dtype="float32", enforce_eager=True, max_model_len=128, disable_log_stats=True, **room)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

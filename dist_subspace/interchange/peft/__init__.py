"""Adapters for PEFT and from it. What PEFT says of a method stands beside the method (`subspace/core/peft_words.py`).

export.py           `export_peft`: which form is exact, and the folder that holds it
forms.py            what a part is to PEFT: an exact LoRA, exact scalings, or a LoRA that comes near
written_forms.py    entries and tensors of those two forms
export_report.py    what an export says of itself
importing.py        `read_peft`, and a folder of PEFT's rewritten as one of ours
trained_in_full.py  which tensors of a file are of modules trained in full
base_copies.py      which are copies of the base's own parameters, and whether they are
"""

"""Weights in and out: one module per family says what Hugging Face's files call each size and each tensor.

Every module has MODEL_TYPE, ARCHITECTURE and four pure functions: `hf_config` and `our_config` for config.json, `to_hf`
and `from_hf` for the tensors. They are tables, read by the two classes in names.py; neither direction needs the
transformers library.
"""

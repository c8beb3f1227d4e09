"""Embedded models: tiny Llama models with imperfect skill and latent skill above it, from generated text.

They exist so that steering can be shown, tested and timed on a bare CPU. They say nothing about real language
models, and no number measured on them may be printed under a real model's name.

    words      the small world: every word there is
    tasks      four tasks with a truth and a shallow rule, their splits, and the documents to learn from
    tokenizer  one token per word
    train      one model from scratch, in minutes
    gate       what a model can do, and whether that is enough to show steering on it
"""

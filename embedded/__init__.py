"""Embedded models: tiny Llama models, trained on generated text, whose latent skill exceeds what they show.

With them steering can be shown, tested and timed on a bare CPU. They say nothing about real language models, and no
number measured on them may be printed under a real model's name.

    words       the whole vocabulary: names, things, events and remarks
    tasks       four tasks with a truth and a shallow rule, their splits, and the training documents
    tokenizer   one token per word
    train       trains one model from scratch, in minutes
    acceptance  measures what a model can do, and whether that is enough to show steering on it
    sae         trains sparse autoencoders of the models
    toxicity    a small toxicity scorer
"""

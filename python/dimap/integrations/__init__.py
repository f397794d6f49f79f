"""Pruning in the training loops of other libraries: a callback for each.

    dimap.integrations.transformers    Trainer of Hugging Face
    dimap.integrations.lightning       Trainer of Lightning

Each imports its library when it is itself imported, and is given by its own name alone.
"""

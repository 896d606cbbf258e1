"""Data-driven starts of prompts."""


def initialize_prompts():
    raise RuntimeError

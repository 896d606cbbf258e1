"""The command line: `vpt-peft <command>` or `python -m vpt_peft <command>`."""

"""The menu: every knob of rayft as frozen, strict pydantic specs. Imports no torch, so it answers
at once.

From a file to a Run, in this order: `parse` (YAML 1.2 with line numbers, `yaml_dialect`),
`override` (a.b=c of the command line), `validate` (the specs; `addresses` and `rules` after them;
what they refuse is said by `messages` with the help of `menu_tree` and `foreign_names`). `load` is
the way through all of them. The specs: `run`, `data`, `methods`, `objectives`, `penalties`,
`strategies`, `sweep` (its `space`, its `sweep_rules`); `base` is what they are made of.
"""

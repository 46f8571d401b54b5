"""Everything a run was asked to do, as a value that a YAML file spells out."""

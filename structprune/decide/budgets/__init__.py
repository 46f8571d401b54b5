"""How much leaves where: one file per budget."""

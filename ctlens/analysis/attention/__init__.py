"""What the heads attend to, and whether it matters."""

"""Cross-model patching: activations of one model are put into another."""

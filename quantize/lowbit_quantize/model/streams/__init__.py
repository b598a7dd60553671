"""What a layer is called with: hidden states and what is read beside them, told or computed around the layers."""

"""The one training loop and what a step consists of: forward pass, loss, optimizer, guard."""

"""How the bundled checkpoint `nano` was made: images, questions, training, measurement."""

"""The hospital side: Flower ClientApp, site policy and state, data preparation, audit."""

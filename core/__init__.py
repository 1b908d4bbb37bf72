"""The learning method and everything both sides share; never imports Flower."""

"""How good a model is: on long text, and at the tasks of lm_eval."""

"""Upcycle a dense language model into a DeepSpeed-MoE and teach it new languages (MoE-LPR, LayerMoE)."""

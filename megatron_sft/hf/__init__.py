"""Hugging Face folders: config.json <-> ModelConfig, tensors <-> model chunks (weights.py), confs, checks"""

"""Losses: functions of tensors and of the networks handed to them."""

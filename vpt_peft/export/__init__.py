"""Write a prompted model with its head to one ONNX or torch.export file that runs without this package."""

from .export import check_target, export_model


__all__ = ["check_target", "export_model"]

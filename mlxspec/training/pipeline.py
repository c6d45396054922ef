"""Run the stages of a recipe in order."""

from pathlib import Path

from mlxspec.errors import TrainingError
from mlxspec.training import stages
from mlxspec.training.checks import check_training
from mlxspec.training.corpus import corpus_files
from mlxspec.training.drafter_folders import trained_steps
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import AnyDrafter
from mlxspec.training.recipe import Finetune, FinetuneData, Recipe
from mlxspec.training.retention import NO_RETENTION
from mlxspec.training.robust import UNIFORM
from mlxspec.training.run_folder import Metrics, check_record, has_results, is_complete, locked_for_all
from mlxspec.training.scoring import ScorerFactory, new_evaluation
from mlxspec.training.step_memory import check_fits, step_bytes
from mlxspec.training.target import Target


def run(recipe: Recipe, folder: Path, target: Target, scorer_factory: ScorerFactory) -> tuple[Path, Metrics]:
    """Run the incomplete stages of a recipe, each in its own folder.

    Errors that can be found without running a stage are raised before the first stage.

    Args:
        recipe: The recipe.
        folder: The folder that holds the stages' folders.
        target: The recipe's target.
        scorer_factory: Makes the function that scores drafters.

    Returns:
        The folder of the last stage's drafter and its scores. If no stage trains a drafter, the folder of the answers
        and no scores.

    Raises:
        MlxspecError: A stage cannot be run, or another process uses the folder.
    """
    with locked_for_all(folder):
        return _run(recipe, folder, target, scorer_factory)


def _run(recipe: Recipe, folder: Path, target: Target, scorer_factory: ScorerFactory) -> tuple[Path, Metrics]:
    made = folder / "answers"
    result: Metrics = {}
    evaluation = None
    if recipe.evaluates:
        evaluation = new_evaluation(recipe.evaluation, target, scorer_factory, recipe.distill)
    drafter = recipe.first_drafter(target) if recipe.trainings else None
    check(recipe, folder, target, drafter)
    answers = text = None
    if recipe.distill:
        prompts, settings = recipe.distill
        answers = stages.distill(
            target, prompts.prompts, prompts.system, settings, folder / "answers", recipe.held_out_prompts
        )
    if drafter and not isinstance(recipe.drafter, str):
        drafter, _ = stages.start_drafter(target, recipe.drafter, answers, folder / "start", recipe.seed)
    if recipe.pretrain and drafter:
        data, training = recipe.pretrain
        text = stages.pretraining_shards(target, data.data, folder / "text")
        stage_folder = folder / "pretrain"
        scored = evaluation if training.evaluate_every else None
        drafter, result = stages.train(target, drafter, [(text, 1.0)], Loss("ce"), training, stage_folder, scored)
        made = stage_folder / "drafter"
    for name, stage in zip(recipe.finetune_names, recipe.finetune, strict=True):
        assert drafter
        assert answers
        stage_folder = folder / name
        scored = evaluation if stage.training.evaluate_every else None
        drafter, result = stages.train(
            target,
            drafter,
            stage.data.sources(answers, text),
            stage.loss,
            stage.training,
            stage_folder,
            scored,
            stage.data.teacher_top_k,
            stage.data.draft_steps,
            stage.robust,
            stage.retention,
            text,
        )
        made = stage_folder / "drafter"
    return made, result


def check(recipe: Recipe, folder: Path, target: Target, drafter: AnyDrafter | None) -> None:
    """Check all stages of a recipe before the first one runs.

    Args:
        recipe: The recipe.
        folder: The folder of the recipe's run. The data of complete stages is not checked.
        target: The recipe's target.
        drafter: The drafter to start from. None if no stage trains one.

    Raises:
        MlxspecError: A stage cannot be run.
    """
    new = drafter is not None and not isinstance(recipe.drafter, str)
    makes = {"answers": recipe.distill, "start": new, "text": recipe.pretrain, "pretrain": recipe.pretrain}
    for name in [*(name for name, made in makes.items() if made), *recipe.finetune_names]:
        check_record(folder / name)
    if recipe.pretrain:
        corpus_files(recipe.pretrain[0].data)
    if recipe.distill:
        data, answers = recipe.distill
        corpus_files(data.prompts)
        if not is_complete(folder / "answers"):
            groups, *_ = stages.distillation_groups(target, data.prompts, data.system, answers, recipe.held_out_prompts)
            tasks = {prompt.task for group in groups for prompt in group.prompts}
            for stage in recipe.finetune:
                # The tasks of pretraining text are not known yet.
                if not (recipe.pretrain and stage.data.mix):
                    stage.robust.check_tasks(tasks)
    trainings = []
    if recipe.pretrain:
        trainings = [("pretrain", Finetune(FinetuneData(), Loss("ce"), UNIFORM, NO_RETENTION, recipe.pretrain[1]))]
    trainings += zip(recipe.finetune_names, recipe.finetune, strict=True)
    for number, (name, stage) in enumerate(trainings, 1):
        assert drafter
        later = next((folder / other for other, _ in trainings[number:] if has_results(folder / other)), None)
        steps = trained_steps(folder / name / "drafter")
        if later and steps and stage.training.steps > steps:
            raise TrainingError(
                f"{later} was trained from the drafter of {folder / name} with steps = {steps}, but this recipe has "
                f"steps = {stage.training.steps}; use {steps} again, or delete the folders of all later stages"
            )
        check_training(target, drafter, stage.loss, stage.training, stage.data.teacher_top_k, stage.data.draft_steps)
        stage.retention.check_text(recipe.pretrain is not None)
        corpus_files(stage.retention.remember)
        if not is_complete(folder / name):
            check_fits(step_bytes(drafter, target, stage.loss, stage.training, stage.data.draft_steps, stage.retention))

from w2s.tracking.report.meaning import meaning


def test_a_masked_stage_beside_the_best_constant() -> None:
    said = meaning({"loss": -0.9, "test/masked_cosine": 0.75, "test/constant_cosine": 0.5, "knn/top1": 0.2})
    assert "at patches that it does not see has a cosine of 0.750" in said
    assert "has 0.500; it closes 50% of the gap to 1." in said


def test_a_student_below_the_constant_closes_nothing() -> None:
    assert "closes" not in meaning({"test/all_cosine": 0.25, "test/constant_cosine": 0.5})


def test_a_clip_beside_guessing() -> None:
    said = meaning({"zero_shot/top1": 0.125, "zero_shot/chance_top1": 0.006, "retrieval/mean_recall_at_10": 0.5})
    assert "names 12.5% of the test images right, where guessing has 0.6%." in said
    assert said.endswith(
        "In 50.0% of the searches among the test images and their captions a right answer is in the first ten."
    )


def test_the_first_of_several_test_sets_is_named() -> None:
    metrics = {"tune/zero_shot/top1": 0.125, "openmoji/zero_shot/top1": 0.5, "tune/retrieval/mean_recall_at_10": None}
    assert meaning(metrics) == "Without training on its classes it names 12.5% of the test images of tune right."


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert meaning({"loss": 1.0, "lr": 0.1}) == ""

import pytest
from made_up import Jitter, Plain, data, session


@pytest.fixture
def made_up_data(monkeypatch):
    """What the commands load instead of a data set."""
    import ltood_fast.data

    monkeypatch.setattr(ltood_fast.data, "load_data", lambda config: data())
    monkeypatch.setattr(ltood_fast.data, "make_augment", lambda config, size: Jitter())
    monkeypatch.setattr(ltood_fast.data, "make_eval_transform", lambda size: Plain())


@pytest.fixture
def make_session(tmp_path):
    def make(run_dir=tmp_path, **options):
        return session(run_dir, **options)

    return make

import torch

from ltood_fast.train.neighbors import EmbeddingQueue


def push(queue, *numbers):
    ids = torch.tensor(numbers)
    queue.push(ids.float().unsqueeze(1), ids, ids % 2)


def test_the_queue_is_first_in_first_out():
    queue = EmbeddingQueue(5)
    assert queue.bank() is None
    push(queue, 0, 1, 2)
    assert queue.bank().ids.tolist() == [0, 1, 2]
    push(queue, 3, 4, 5)
    assert queue.bank().ids.tolist() == [1, 2, 3, 4, 5]
    assert queue.bank().z.flatten().tolist() == [1, 2, 3, 4, 5]
    assert queue.bank().domain.tolist() == [1, 0, 1, 0, 1]
    push(queue, *range(10, 18))  # a batch larger than the queue
    assert queue.bank().ids.tolist() == [13, 14, 15, 16, 17]


def test_the_queue_holds_no_gradient():
    queue = EmbeddingQueue(4)
    queue.push(torch.ones(2, 3, requires_grad=True) * 2, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert not queue.bank().z.requires_grad


def test_the_state_of_a_queue_goes_round():
    queue, other = EmbeddingQueue(4), EmbeddingQueue(4)
    other.load_state_dict(queue.state_dict())
    assert other.bank() is None
    push(queue, 0, 1, 2)
    other.load_state_dict(queue.state_dict())
    push(queue, 3, 4)
    push(other, 3, 4)
    assert other.bank().ids.tolist() == queue.bank().ids.tolist() == [1, 2, 3, 4]

from secateur.structure.policy import POLICIES, Policy, contract


def test_heads_go_whole_before_parts_of_them():
    assert POLICIES[0].whole_heads
    assert len(set(POLICIES)) == len(POLICIES)


def test_configs_that_cannot_tell_are_left_behind_last():
    assert [policy.told for policy in POLICIES] == [True] * (len(POLICIES) - 1) + [False]


def test_beside_logits_the_inner_states_are_no_contract():
    out = {"logits": 1, "hidden_states": 2, "last_hidden_state": 3, "past_key_values": 4, "image_embeds": 5}
    assert contract(out) == {"logits": 1, "image_embeds": 5}


def test_without_logits_all_is_contract():
    assert contract({"last_hidden_state": 3}) == {"last_hidden_state": 3}
    assert contract((1, 2)) == (1, 2)


def test_policies_that_answer_alike():
    assert Policy(cut_remade=True).like(["whole_heads"]) == Policy()
    assert Policy(cut_remade=True).like(["cut_remade"]) == Policy(cut_remade=True)

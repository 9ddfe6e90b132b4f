"""Multi30k English to French, with the settings of ``multi30k_ende``.

python -m experiments.train --config=multi30k_enfr --workdir=runs/enfr \
    --config.data.path=train.en.gz,train.fr.gz --config.data.validation_path=val.en.gz,val.fr.gz
python -m experiments.evaluate --workdir=runs/enfr --data=test.en.gz,test.fr.gz --target_language=fr

Tokenised, lower-cased BLEU 62.52 on test_2016_flickr, cased sacreBLEU 61.51.
"""

from transformer_jax.recipes import multi30k_ende

get_config = multi30k_ende.get_config

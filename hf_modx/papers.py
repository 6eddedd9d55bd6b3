"""What to cite: BibTeX of the papers whose models and methods are here."""

SIGLIP = """@inproceedings{zhai2023siglip,
  title = {Sigmoid Loss for Language Image Pre-Training},
  author = {Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
  booktitle = {International Conference on Computer Vision},
  year = {2023}
}"""
ZSCL = """@inproceedings{zheng2023zscl,
  title = {Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models},
  author = {Zheng, Zangwei and Ma, Mingyuan and Wang, Kai and Qin, Ziheng and Yue, Xiangyu and You, Yang},
  booktitle = {International Conference on Computer Vision},
  pages = {19125--19136},
  year = {2023}
}"""

PAPERS = {
    "clip": """@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
            Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
            Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}""",
    "siglip": SIGLIP,
    "siglip2": SIGLIP,
    "lora": """@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and
            Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "ModX": """@inproceedings{ni2023modx,
  title = {Continual Vision-Language Representation Learning with Off-Diagonal Information},
  author = {Ni, Zixuan and Wei, Longhui and Tang, Siliang and Zhuang, Yueting and Tian, Qi},
  booktitle = {International Conference on Machine Learning},
  pages = {26129--26149},
  year = {2023}
}""",
    "DKR": """@inproceedings{cui2024dkr,
  title = {Continual Vision-Language Retrieval via Dynamic Knowledge Rectification},
  author = {Cui, Zhenyu and Peng, Yuxin and Wang, Xun and Zhu, Manyu and Zhou, Jiahuan},
  booktitle = {AAAI Conference on Artificial Intelligence},
  pages = {11704--11712},
  year = {2024}
}""",
    "ReferenceDistillation": ZSCL,
    "WeightEnsemble": ZSCL,
    "IncCLIP": """@inproceedings{yan2022incclip,
  title = {Generative Negative Text Replay for Continual Vision-Language Pretraining},
  author = {Yan, Shipeng and Hong, Lanqing and Xu, Hang and Han, Jianhua and Tuytelaars, Tinne and Li, Zhenguo and
            He, Xuming},
  booktitle = {European Conference on Computer Vision},
  year = {2022}
}""",
    "ProjectedDistillation": """@inproceedings{liu2025cclip,
  title = {C-CLIP: Multimodal Continual Learning for Vision-Language Model},
  author = {Liu, Wenzhuo and Zhu, Fei and Wei, Longhui and Tian, Qi},
  booktitle = {International Conference on Learning Representations},
  year = {2025}
}""",
    "EWC": """@article{kirkpatrick2017ewc,
  title = {Overcoming catastrophic forgetting in neural networks},
  author = {Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and Desjardins, Guillaume and
            Rusu, Andrei A. and Milan, Kieran and Quan, John and Ramalho, Tiago and Grabska-Barwinska, Agnieszka and
            Hassabis, Demis and Clopath, Claudia and Kumaran, Dharshan and Hadsell, Raia},
  journal = {Proceedings of the National Academy of Sciences},
  volume = {114},
  number = {13},
  pages = {3521--3526},
  year = {2017}
}""",
    "LwF": """@inproceedings{li2016lwf,
  title = {Learning Without Forgetting},
  author = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {European Conference on Computer Vision},
  pages = {614--629},
  year = {2016}
}""",
    "Anchor": """@inproceedings{hou2019lucir,
  title = {Learning a Unified Classifier Incrementally via Rebalancing},
  author = {Hou, Saihui and Pan, Xinyu and Loy, Chen Change and Wang, Zilei and Lin, Dahua},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  pages = {831--839},
  year = {2019}
}""",
    "L2SP": """@inproceedings{li2018l2sp,
  title = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author = {Li, Xuhong and Grandvalet, Yves and Davoine, Franck},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}""",
    "WiseFT": """@inproceedings{wortsman2022robust,
  title = {Robust Fine-Tuning of Zero-Shot Models},
  author = {Wortsman, Mitchell and Ilharco, Gabriel and Kim, Jong Wook and Li, Mike and Kornblith, Simon and
            Roelofs, Rebecca and Gontijo-Lopes, Raphael and Hajishirzi, Hannaneh and Farhadi, Ali and
            Namkoong, Hongseok and Schmidt, Ludwig},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  pages = {7959--7971},
  year = {2022}
}""",
    "ExperienceReplay": """@article{chaudhry2019er,
  title = {On Tiny Episodic Memories in Continual Learning},
  author = {Chaudhry, Arslan and Rohrbach, Marcus and Elhoseiny, Mohamed and Ajanthan, Thalaiyasingam and
            Dokania, Puneet K. and Torr, Philip H. S. and Ranzato, Marc'Aurelio},
  journal = {arXiv preprint arXiv:1902.10486},
  year = {2019}
}""",
    "DarkExperienceReplay": """@inproceedings{buzzega2020der,
  title = {Dark Experience for General Continual Learning: a Strong, Simple Baseline},
  author = {Buzzega, Pietro and Boschini, Matteo and Porrello, Angelo and Abati, Davide and Calderara, Simone},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {33},
  pages = {15920--15930},
  year = {2020}
}""",
    "Cumulative": """@inproceedings{garg2024ticclip,
  title = {TiC-CLIP: Continual Training of CLIP Models},
  author = {Garg, Saurabh and Farajtabar, Mehrdad and Pouransari, Hadi and Vemulapalli, Raviteja and Mehta, Sachin and
            Tuzel, Oncel and Shankar, Vaishaal and Faghri, Fartash},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}""",
}
"""By type of the model, value of `peft` and class of the loss callbacks; DKR is `ModX(screen="rectify")`."""
